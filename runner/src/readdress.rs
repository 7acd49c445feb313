//! Addresses inside a guest that took over: changed through its agent, by the rules of its job that say so.
//!
//! Invariants
//! - The machine has taken over before anything is said to its guest: what fails here is told, and takes nothing back.
//! - Of a guest only addresses are read, and nothing it says is run anywhere but in itself.
//! - An address that no rule covers stays as it is; one that is there already is not put a second time.
//!
//! Not here: what a guest reads when it starts. It has the new addresses until then; a program of a plan, or whoever makes
//! the guest, writes them where its distribution looks.

use std::{
    io,
    net::Ipv4Addr,
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    fail::{Code, Fail, Result},
    job::backup::agent::Agent,
    replica::rules::{Addresses, Through},
};

/// How long a guest may take until its agent answers.
const BOOT: Duration = Duration::from_secs(300);

/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(500);

/// How long one order may take.
const ORDER: Duration = Duration::from_secs(20);

/// What is run in the guest: `DEVICE OLD LENGTH NEW LENGTH GATEWAY SERVERS`, `-` for what is not said.
const SCRIPT: &str = r#"
PATH=$PATH:/usr/sbin:/sbin:/usr/bin:/bin
# Of two in one network one is the other's secondary, and goes with it: it is put there once more.
back() {
    ip addr replace "$2/$3" dev "$1"
    ip addr del "$4/$5" dev "$1"
    ip addr replace "$2/$3" dev "$1"
    exit 1
}
ip addr replace "$4/$5" dev "$1" || exit 1
ip addr del "$2/$3" dev "$1" || back "$@"
ip addr replace "$4/$5" dev "$1" || back "$@"
if [ "$6" != - ]; then ip route replace default via "$6" dev "$1" || back "$@"; fi
if [ "$7" != - ]; then
    for server in $(echo "$7" | tr , ' '); do echo "nameserver $server"; done > /etc/resolv.conf || back "$@"
fi
"#;

/// An address of the guest that is to be another one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Change {
    device: String,
    old: Ipv4Addr,
    old_length: u64,
    new: Ipv4Addr,
    new_length: u32,
    gateway: Option<String>,
    servers: Vec<String>,
}

/// Waits until the guest's agent answers, and changes its addresses. Answers what was changed, in a word each.
///
/// # Errors
/// [`Code::Guest`]: no agent in time, none of its addresses is covered, or the guest refuses; what `go_on` says.
pub fn readdress(agent: &Path, rules: &[Addresses], go_on: &dyn Fn() -> Result<()>) -> Result<Vec<String>> {
    let refused = |what: &str, error: &io::Error| Fail::new(Code::Guest, what).at(agent.display()).cause(error);
    let mut channel = answering(agent, go_on)?;
    let interfaces = channel
        .ask("guest-network-get-interfaces", &json!({}), ORDER)
        .map_err(|e| refused("the guest does not tell its addresses", &e))?;
    let wanted = changes(&interfaces, rules);
    if wanted.is_empty() {
        // Done already, by whoever carried this out before, or for a machine that has not started anew.
        if is_there(&interfaces, rules) {
            return Ok(Vec::new());
        }
        let there = of(&interfaces).into_iter().map(|(_, address, _)| address.to_string()).collect::<Vec<_>>();
        let what = format!("no rule covers an address of the guest, which has {}", there.join(", "));
        return Err(Fail::new(Code::Guest, what));
    }
    let mut done = Vec::new();
    for change in wanted {
        carry_out(&mut channel, &change)
            .map_err(|e| refused(&format!("{} of the guest stays as it is", change.old), &e))?;
        done.push(format!("{} is now {}", change.old, change.new));
    }
    Ok(done)
}

fn answering(path: &Path, go_on: &dyn Fn() -> Result<()>) -> Result<Agent> {
    let began = Instant::now();
    loop {
        go_on()?;
        match Agent::connect(path) {
            Ok(agent) => return Ok(agent),
            Err(error) if began.elapsed() >= BOOT => {
                let what = format!("the guest's agent did not answer within {} s", BOOT.as_secs());
                return Err(Fail::new(Code::Guest, what).at(path.display()).cause(error));
            }
            Err(_) => std::thread::sleep(AGAIN),
        }
    }
}

/// Device, address and length of its network's part, of each address that leads somewhere.
fn of(interfaces: &Value) -> Vec<(String, Ipv4Addr, u64)> {
    let mut found = Vec::new();
    for interface in interfaces.as_array().into_iter().flatten() {
        let Some(name) = interface.get("name").and_then(Value::as_str) else { continue };
        for address in interface.get("ip-addresses").and_then(Value::as_array).into_iter().flatten() {
            let text = address.get("ip-address").and_then(Value::as_str);
            let Some(parsed) = text.and_then(|text| text.parse::<Ipv4Addr>().ok()) else { continue };
            let length = address.get("prefix").and_then(Value::as_u64).unwrap_or(32);
            if !parsed.is_loopback() {
                found.push((name.to_owned(), parsed, length));
            }
        }
    }
    found
}

fn changes(interfaces: &Value, rules: &[Addresses]) -> Vec<Change> {
    let there = of(interfaces);
    let mut wanted = Vec::new();
    for (device, old, old_length) in &there {
        let rules = rules.iter().filter(|rule| rule.through == Through::Agent);
        let mut covering = rules.filter_map(|rule| Some((rule, rule.moved(*old)?, rule.length()?)));
        let Some((rule, new, new_length)) = covering.next() else { continue };
        if there.iter().any(|(_, known, _)| *known == new) {
            continue;
        }
        wanted.push(Change {
            device: device.clone(),
            old: *old,
            old_length: *old_length,
            new,
            new_length,
            gateway: rule.gateway.clone(),
            servers: rule.dns.clone(),
        });
    }
    wanted
}

/// Whether the guest has an address that a rule leads to.
fn is_there(interfaces: &Value, rules: &[Addresses]) -> bool {
    let ends = rules.iter().map(|rule| Addresses { from: rule.to.clone(), ..rule.clone() });
    let ends: Vec<_> = ends.collect();
    of(interfaces).iter().any(|(_, address, _)| ends.iter().any(|end| end.moved(*address) == Some(*address)))
}

fn carry_out(agent: &mut Agent, change: &Change) -> io::Result<()> {
    let none = || "-".to_owned();
    let servers = if change.servers.is_empty() { none() } else { change.servers.join(",") };
    let arguments = [
        "-c".to_owned(),
        SCRIPT.to_owned(),
        "aquifer".to_owned(),
        change.device.clone(),
        change.old.to_string(),
        change.old_length.to_string(),
        change.new.to_string(),
        change.new_length.to_string(),
        change.gateway.clone().unwrap_or_else(none),
        servers,
    ];
    let started = agent.ask("guest-exec", &json!({ "path": "/bin/sh", "arg": arguments }), ORDER)?;
    let began = Instant::now();
    while began.elapsed() < ORDER {
        let status = agent.ask("guest-exec-status", &json!({ "pid": started.get("pid") }), ORDER)?;
        if status.get("exited").and_then(Value::as_bool) == Some(true) {
            return match status.get("exitcode").and_then(Value::as_i64) {
                Some(0) => Ok(()),
                code => Err(io::Error::other(format!("its `ip` ended with {code:?}"))),
            };
        }
        std::thread::sleep(AGAIN / 5);
    }
    Err(io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_rule_covers_is_changed_and_only_once() {
        let rule = |from: &str, to: &str, through| Addresses {
            from: from.into(),
            to: to.into(),
            mask: "255.255.255.0".into(),
            gateway: Some("10.9.0.1".into()),
            dns: Vec::new(),
            through,
        };
        let interfaces = json!([
            { "name": "lo", "ip-addresses": [{ "ip-address": "127.0.0.1", "prefix": 8 }] },
            { "name": "eth0", "ip-addresses": [{ "ip-address": "10.1.0.7", "prefix": 16 }, { "ip-address": "fe80::1" }] },
            { "name": "eth1", "ip-addresses": [{ "ip-address": "10.2.0.7", "prefix": 24 }] },
            { "name": "eth2" }, 7,
        ]);
        let rules = [rule("10.2.*.*", "10.8.*.*", Through::Programs), rule("10.1.0.*", "10.9.0.*", Through::Agent)];
        let wanted = changes(&interfaces, &rules);
        assert_eq!(wanted.len(), 1);
        let change = &wanted[0];
        assert_eq!((change.device.as_str(), change.new.to_string()), ("eth0", "10.9.0.7".into()));
        assert_eq!((change.old_length, change.new_length), (16, 24));
        let after = json!([{ "name": "eth0", "ip-addresses": [
            { "ip-address": "10.1.0.7", "prefix": 16 }, { "ip-address": "10.9.0.7", "prefix": 24 }] }]);
        assert!(changes(&after, &rules).is_empty() && is_there(&after, &rules) && !is_there(&interfaces, &rules));
        assert!(changes(&json!("nonsense"), &rules).is_empty());
    }
}
