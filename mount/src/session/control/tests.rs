//! Messages on the wire: bounded, versioned, whole.

use super::*;

fn pair() -> (UnixStream, Wire) {
    let (raw, end) = UnixStream::pair().expect("pair");
    (raw, Wire::answering(end, Path::new("control.sock")))
}

#[test]
fn orders_go_there_and_back() {
    let (raw, mut end) = pair();
    let mut asking = Wire::asking(raw, Path::new("control.sock"));
    let orders = [
        Request::Status,
        Request::Set { rate: Setting::To(7), ready_by: Setting::Clear },
        Request::Drain { disk: Some("vda".into()) },
        Request::Stop { clients: Clients::Respect },
        Request::Call { name: "pivot".into(), args: serde_json::json!({ "disk": "vda" }) },
    ];
    for order in orders {
        asking.send(&order).expect("send");
        assert_eq!(end.receive::<Request>().expect("receive"), Some(order));
    }
    drop(asking);
    assert_eq!(end.receive::<Request>().expect("end"), None);
}

#[test]
fn the_words_on_the_wire_are_these() {
    let (mut raw, mut end) = pair();
    raw.write_all(b"{\"version\":1,\"body\":{\"verb\":\"set\",\"rate\":{\"to\":5}}}\n").expect("write");
    let set = Request::Set { rate: Setting::To(5), ready_by: Setting::Keep };
    assert_eq!(end.receive::<Request>().expect("receive"), Some(set));
    raw.write_all(b"{\"version\":1,\"body\":{\"verb\":\"stop\",\"clients\":\"disconnect\"}}\n").expect("write");
    assert_eq!(end.receive::<Request>().expect("receive"), Some(Request::Stop { clients: Clients::Disconnect }));
}

#[test]
fn nonsense_is_an_error() {
    let long = format!("{{\"version\":1,\"body\":\"{}\"}}\n", "x".repeat(100_000));
    let deep = format!("{}\n", "[".repeat(60_000));
    for text in [
        "\n",
        "null\n",
        "{\"version\":2,\"body\":{\"verb\":\"status\"}}\n",
        "{\"version\":1,\"body\":{\"verb\":\"explode\"}}\n",
        "{\"version\":1,\"body\":{\"verb\":\"set\",\"speed\":1}}\n",
        "{\"version\":1",
        "\u{0}\u{1}\n",
        long.as_str(),
        deep.as_str(),
    ] {
        let (mut raw, mut end) = pair();
        raw.write_all(text.as_bytes()).expect("write");
        drop(raw);
        let got = end.receive::<Request>();
        assert!(matches!(got, Err(Error::Protocol { .. })), "{:?}: {got:?}", text.get(..30).unwrap_or(text));
    }
}

#[test]
fn settings_keep_clear_or_replace() {
    assert_eq!(Setting::Keep.apply(Some(1)), Some(1));
    assert_eq!(Setting::Clear.apply(Some(1)), None);
    assert_eq!(Setting::To(2).apply(Some(1)), Some(2));
}
