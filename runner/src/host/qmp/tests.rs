//! The monitor's protocol against a peer that behaves, is slow, or is hostile.

use std::{thread, time::Duration};

use super::*;

const SOON: Duration = Duration::from_secs(5);

/// Talks to a client as QEMU would: the greeting, then for each request the given lines (`$ID` is the request's id).
fn peer(replies: &'static [&'static str]) -> Qmp {
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    thread::spawn(move || {
        let mut lines = io::BufReader::new(theirs.try_clone().expect("clone"));
        theirs.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n").expect("greet");
        let mut all = vec!["{\"return\": {}, \"id\": $ID}\n"];
        all.extend(replies);
        for reply in all {
            let mut line = String::new();
            if io::BufRead::read_line(&mut lines, &mut line).unwrap_or(0) == 0 {
                return;
            }
            let request: Value = serde_json::from_str(&line).expect("a request");
            let _ = theirs.write_all(reply.replace("$ID", &request["id"].to_string()).as_bytes());
        }
        // Hold the connection open until the client is done.
        let _ = io::BufRead::read_line(&mut lines, &mut String::new());
    });
    Qmp::over(ours, Path::new("test"), SOON).expect("negotiate")
}

#[test]
fn a_reply_is_matched_by_id_and_events_wait_in_order() {
    let mut qmp = peer(&[
        "{\"event\": \"STOP\"}\n{\"return\": \"stale\", \"id\": 77}\n{\"event\": \"RESUME\", \"data\": {\"a\": 1}}\n{\"return\": 5, \"id\": $ID}\n",
    ]);
    assert_eq!(qmp.execute("any", json!({}), SOON).expect("reply"), json!(5));
    assert_eq!(qmp.event(Duration::ZERO).expect("event").expect("first").name, "STOP");
    let second = qmp.event(SOON).expect("event").expect("second");
    assert_eq!((second.name.as_str(), second.data), ("RESUME", json!({ "a": 1 })));
    assert_eq!(qmp.event(Duration::from_millis(20)).expect("none"), None);
}

#[test]
fn a_refusal_carries_the_words_without_control_characters() {
    let mut qmp =
        peer(&["{\"error\": {\"class\": \"GenericError\", \"desc\": \"bad \\u001b[31mnode\"}, \"id\": $ID}\n"]);
    match qmp.execute("blockdev-del", json!({}), SOON) {
        Err(Error::Refused { command, class, what }) => {
            assert_eq!(
                (command.as_str(), class.as_str(), what.as_str()),
                ("blockdev-del", "GenericError", "bad [31mnode")
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn silence_ends_in_a_timeout_and_a_late_reply_is_not_taken_for_the_next() {
    let mut qmp = peer(&["", "{\"return\": \"old\", \"id\": 2}\n{\"return\": \"new\", \"id\": $ID}\n"]);
    assert!(matches!(qmp.execute("slow", json!({}), Duration::from_millis(50)), Err(Error::Timeout { .. })));
    assert_eq!(qmp.execute("next", json!({}), SOON).expect("reply"), json!("new"));
}

#[test]
fn an_endless_line_and_garbage_are_refused() {
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    let sender = thread::spawn(move || {
        let piece = vec![b'x'; 1 << 20];
        while theirs.write_all(&piece).is_ok() {}
    });
    assert!(matches!(Qmp::over(ours, Path::new("test"), SOON), Err(Error::Protocol { .. })));
    sender.join().expect("sender");

    let mut qmp = peer(&["}{ not json\n"]);
    assert!(matches!(qmp.execute("any", json!({}), SOON), Err(Error::Protocol { .. })));
}

#[test]
fn the_queue_of_events_is_bounded() {
    let (ours, mut theirs) = UnixStream::pair().expect("pair");
    let sender = thread::spawn(move || {
        theirs.write_all(b"{\"QMP\": {}}\n{\"return\": {}, \"id\": 1}\n").expect("greet");
        for n in 0..EVENTS_MAX + 10 {
            writeln!(theirs, "{{\"event\": \"E{n}\"}}").expect("event");
        }
        theirs.write_all(b"{\"return\": {}, \"id\": 2}\n").expect("reply");
        theirs
    });
    let mut qmp = Qmp::over(ours, Path::new("test"), SOON).expect("negotiate");
    qmp.execute("any", json!({}), SOON).expect("reply");
    assert_eq!(qmp.events.len(), EVENTS_MAX);
    assert_eq!(qmp.event(SOON).expect("event").expect("oldest kept").name, "E10");
    drop(sender.join());
}
