//! The reading of failover plans.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use super::{Fencing, Gate, OnFailure, Plan, PlanEntry, Reading, prove::What, shape::Values};

impl Reading<'_> {
    pub(super) fn plans(&mut self, top: Values<'_, '_>) -> BTreeMap<String, Plan> {
        let mut plans = BTreeMap::new();
        for (name, table, place) in top.named("plan") {
            let by = format!("plan.{name}");
            let mut entries: Vec<PlanEntry> = Vec::new();
            for (entry, place) in table.tables("entries") {
                let Some(entry) = self.entry(&by, entry) else { continue };
                if entries.iter().any(|known| known.machine == entry.machine) {
                    self.reader.problem(place, format!("{by} names `{}` twice", entry.machine));
                    continue;
                }
                entries.push(entry);
            }
            if entries.is_empty() && table.has("entries") {
                self.reader.problem(place, format!("{by}: `entries` is empty"));
            }
            self.order(&by, table, &entries);
            let fence = match table.text("fence").as_deref() {
                Some("graceful") => Fencing::Graceful,
                Some("force") => Fencing::Force,
                _ => Fencing::None,
            };
            let programs = |key| table.plain_texts(key).into_iter().map(PathBuf::from).collect();
            let at_once = table.number("at_once").unwrap_or(10);
            plans.insert(name, Plan { entries, fence, pre: programs("pre"), post: programs("post"), at_once });
        }
        plans
    }

    fn entry(&mut self, by: &str, table: Values<'_, '_>) -> Option<PlanEntry> {
        let machine = table.text("machine")?;
        self.names.refer(What::Machine, &machine, by, table.place("machine"));
        self.names.refer(What::Replicated, &machine, by, table.place("machine"));
        let mut gates = Vec::new();
        for (key, texts) in [("gate", table.text("gate").into_iter().collect()), ("gates", table.plain_texts("gates"))]
        {
            gates.extend(texts.iter().filter_map(|text| self.read(table, key, gate(text))));
        }
        Some(PlanEntry {
            machine,
            after: table.has("after").then(|| table.plain_texts("after")),
            delay: table.duration("delay").unwrap_or_default(),
            gates,
            timeout: table.duration("timeout").unwrap_or(Duration::from_secs(300)),
            on_failure: match table.text("on_failure").as_deref() {
                Some("stop") => OnFailure::Stop,
                Some("wait") => OnFailure::Wait,
                _ => OnFailure::Continue,
            },
        })
    }

    /// Proves that `after` names machines of the plan that stand before: then no order runs in a circle.
    fn order(&mut self, by: &str, table: Values<'_, '_>, entries: &[PlanEntry]) {
        let mut before: Vec<&str> = Vec::new();
        for (entry, _) in table.tables("entries") {
            for (name, place) in entry.texts("after") {
                if before.contains(&name.as_str()) {
                    continue;
                }
                let what = if entries.iter().any(|known| known.machine == name) {
                    format!("{by}: `after` names `{name}`, which does not stand before it")
                } else {
                    format!("{by}: `after` names `{name}`, which is not in this plan")
                };
                self.reader.problem(place, what);
            }
            let machine = entry.text("machine");
            before.extend(
                entries.iter().map(|known| known.machine.as_str()).filter(|known| Some(*known) == machine.as_deref()),
            );
        }
    }
}

fn gate(text: &str) -> Result<Gate, String> {
    let bad = || format!("`{text}` is no gate; write `agent`, `tcp:5432`, `http:80/health` or the path of a program");
    if text == "agent" {
        return Ok(Gate::Agent);
    }
    if text.starts_with('/') {
        return Ok(Gate::Program(text.into()));
    }
    let port = |word: &str| word.parse().ok().filter(|port| *port > 0).ok_or_else(bad);
    match text.split_once(':') {
        Some(("tcp", word)) => Ok(Gate::Tcp(port(word)?)),
        Some(("http", rest)) => {
            let (word, path) = rest.split_once('/').unwrap_or((rest, ""));
            Ok(Gate::Http { port: port(word)?, path: format!("/{path}") })
        }
        _ => Err(bad()),
    }
}
