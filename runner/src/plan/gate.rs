//! When a machine that took over is ready: its agent answers, a port of it takes connections, a page answers, or a
//! program says so.
//!
//! A machine behind an address translation of its own is reached through a port of ours that leads into it for as long
//! as the gate is tried: nothing stays open.
//!
//! Invariants
//! - A connection that the translation took, and the machine did not, opens no gate.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use serde_json::json;

use super::program;
use crate::{
    fail::{Code, Fail, Result},
    host::{Running, qmp::Qmp},
    job::backup::agent::Agent,
    site::Gate,
    stop::Stop,
};

/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(500);

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(3);

/// A machine that is to become ready.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    /// The plan.
    pub(super) plan: &'a str,
    /// The machine.
    pub(super) machine: &'a str,
    /// Its replica.
    pub(super) replica: &'a str,
    /// Rules for its addresses, one in a line: from, to, netmask, gateway, name servers.
    pub(super) addresses: String,
    /// Its process; none where it was not started.
    pub(super) running: Option<&'a Running>,
}

/// Waits until every gate has opened, the one after the other.
///
/// # Errors
/// [`Code::Timeout`] with what the last attempt found; the interruption.
pub(super) fn wait(entry: &Entry<'_>, gates: &[Gate], limit: Duration, stop: Stop) -> Result<()> {
    let began = Instant::now();
    gates.iter().try_for_each(|gate| opens(entry, gate, (began, limit), stop))
}

fn opens(entry: &Entry<'_>, gate: &Gate, (began, limit): (Instant, Duration), stop: Stop) -> Result<()> {
    loop {
        stop.check()?;
        let left = limit.saturating_sub(began.elapsed());
        let found = match attempt(entry, gate, left, stop) {
            Ok(()) => return Ok(()),
            Err(fail) => fail.what,
        };
        stop.check()?;
        if began.elapsed() >= limit {
            let what = format!("{} was not ready within {} s: {found}", entry.machine, limit.as_secs());
            return Err(Fail::new(Code::Timeout, what));
        }
        stop.wait(AGAIN);
    }
}

fn attempt(entry: &Entry<'_>, gate: &Gate, left: Duration, stop: Stop) -> Result<()> {
    if let Some(running) = entry.running.filter(|running| !running.process.is_alive()) {
        return Err(Fail::new(Code::Guest, "its process is gone").at(running.log.display()));
    }
    match gate {
        Gate::Program(path) => {
            let text = |path: Option<&std::path::PathBuf>| path.map(|p| p.display().to_string()).unwrap_or_default();
            let variables = [
                ("AQUIFER_PLAN", entry.plan.to_owned()),
                ("AQUIFER_MACHINE", entry.machine.to_owned()),
                ("AQUIFER_REPLICA", entry.replica.to_owned()),
                ("AQUIFER_ADDRESSES", entry.addresses.clone()),
                ("AQUIFER_CONSOLE_LOG", text(entry.running.map(|running| &running.console_log))),
                ("AQUIFER_MONITOR", text(entry.running.map(|running| &running.orders))),
            ];
            program::run(path, &variables, left.max(ATTEMPT), stop)
        }
        Gate::Agent => agent(running(entry)?),
        Gate::Tcp(port) => Way::into(running(entry)?, *port)?.taken(),
        Gate::Http { port, path } => Way::into(running(entry)?, *port)?.answers(path),
    }
}

fn running<'a>(entry: &Entry<'a>) -> Result<&'a Running> {
    entry.running.ok_or_else(|| Fail::new(Code::Guest, "it does not run"))
}

fn not_yet(what: impl Into<String>) -> Fail {
    Fail::new(Code::Net, what)
}

fn agent(running: &Running) -> Result<()> {
    let socket = running.orders.with_file_name("agent.sock");
    let failed = |e: std::io::Error| not_yet(format!("its agent does not answer ({e})"));
    Agent::connect(&socket).map(drop).map_err(failed)
}

/// A port of ours that leads to one of the machine, until dropped.
struct Way {
    monitor: Qmp,
    address: SocketAddr,
}

impl Way {
    fn into(running: &Running, port: u16) -> Result<Self> {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
        let address = free.map_err(|e| Fail::io("a port", "find", &e))?;
        let monitor = Qmp::connect(&running.orders, ATTEMPT)?;
        let mut way = Self { monitor, address };
        let said = way.monitor_says(&format!("hostfwd_add net0 tcp:127.0.0.1:{}-:{port}", address.port()))?;
        if said.trim().is_empty() { Ok(way) } else { Err(not_yet(format!("no way into its network: {}", said.trim()))) }
    }

    fn monitor_says(&mut self, line: &str) -> Result<String> {
        let answer = self.monitor.execute("human-monitor-command", json!({ "command-line": line }), ATTEMPT)?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    fn connect(&self) -> Result<TcpStream> {
        let failed = |e: std::io::Error| not_yet(format!("no connection ({e})"));
        let stream = TcpStream::connect_timeout(&self.address, ATTEMPT).map_err(failed)?;
        stream.set_read_timeout(Some(ATTEMPT)).map_err(failed)?;
        Ok(stream)
    }

    /// Whether the machine itself took a connection.
    fn taken(mut self) -> Result<()> {
        let _stream = self.connect()?;
        let until = Instant::now() + ATTEMPT;
        let port = self.address.port().to_string();
        while Instant::now() < until {
            let table = self.monitor_says("info usernet")?;
            let ours = |line: &str| line.split_whitespace().any(|word| word == port);
            if table.lines().any(|line| ours(line) && line.contains("ESTABLISHED")) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Err(not_yet("the port takes no connections"))
    }

    fn answers(self, path: &str) -> Result<()> {
        let mut stream = self.connect()?;
        let failed = |e: std::io::Error| not_yet(format!("the page does not answer ({e})"));
        let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).map_err(failed)?;
        let mut answer = [0; 64];
        let len = stream.read(&mut answer).map_err(failed)?;
        let said = String::from_utf8_lossy(answer.get(..len).unwrap_or_default()).into_owned();
        let status = said.split_whitespace().nth(1).unwrap_or_default();
        let good = said.starts_with("HTTP/") && (status.starts_with('2') || status.starts_with('3'));
        if good { Ok(()) } else { Err(not_yet(format!("the page answers `{status}`"))) }
    }
}

impl Drop for Way {
    fn drop(&mut self) {
        let line = format!("hostfwd_remove net0 tcp:127.0.0.1:{}", self.address.port());
        let _ = self.monitor_says(&line);
    }
}
