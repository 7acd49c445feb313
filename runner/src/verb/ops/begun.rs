//! What was asked for when an operation was begun, in the words of the command line: whoever types the command again goes
//! on with that, and with nothing else.
//!
//! Invariants
//! - Words that only say what is so anyway are not told apart from none, but for the time a guest has and the network.
//! - The reason is for the record and changes nothing that is done.
//! - `--force` may be said later: it changes nothing of what was done, and what cannot go on without it goes on with it.
//! - Who only says that something goes on says nothing else: what is not said stays as it was begun.
//!
//! Not here: what is done with an operation that was cut short.

use std::{fmt, time::Duration};

use crate::{
    context::quoted,
    fail::{Code, Fail, Result},
    host::Network,
    operate::{Act, Ask, Fence},
    plan::{self, PlanSpec},
    replica::{
        desk,
        model::{Home, HomeKind, Switch},
    },
    verb::failback::OnDrift,
};

/// How long a guest has, as it is typed, where nobody says it.
pub(in crate::verb) const GRACE: &str = "15m";

/// The one option that may be added later: what was begun without it, and cannot go on, goes on with it.
const FORCE: &str = "--force";

/// The options of an operation, as they are typed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::verb) struct Options(Vec<String>);

impl Options {
    /// With a word of its own where it is so.
    #[must_use]
    pub(in crate::verb) fn flag(mut self, name: &str, is_so: bool) -> Self {
        self.0.extend(is_so.then(|| name.to_owned()));
        self
    }

    /// With a value where there is one.
    #[must_use]
    pub(in crate::verb) fn value(mut self, name: &str, value: Option<String>) -> Self {
        self.0.extend(value.map(|value| format!("{name} {}", quoted(&value))));
        self
    }

    /// With the restore point of several machines at once.
    #[must_use]
    pub(in crate::verb) fn point(self, point: &str) -> Self {
        self.value("--to", Some(point.to_owned()).filter(|point| point != "latest"))
    }

    /// With the time a guest has.
    #[must_use]
    pub(in crate::verb) fn grace(self, grace: Duration) -> Self {
        self.value("--grace", Some(typed(grace)))
    }

    /// With the place of network cards.
    #[must_use]
    pub(in crate::verb) fn network(self, network: Network) -> Self {
        let word = if network == Network::None { "none" } else { "user" };
        self.value("--network", Some(word.to_owned()))
    }

    /// With the time of the change of sides.
    #[must_use]
    pub(in crate::verb) fn switch(self, switch: Switch) -> Self {
        let word = match switch {
            Switch::Auto => Some("now".to_owned()),
            Switch::Manual => None,
            Switch::At(time) => Some(time.to_string()),
        };
        self.value("--switch", word)
    }

    /// With what happens to production first.
    #[must_use]
    pub(in crate::verb) fn fence(self, fence: Option<Fence>) -> Self {
        let word = |fence| match fence {
            Fence::None => "none",
            Fence::Graceful => "graceful",
            Fence::Force => "force",
        };
        self.value("--fence", fence.map(|fence| word(fence).to_owned()))
    }

    /// With what becomes of a description that differs.
    #[must_use]
    pub(in crate::verb) fn drift(self, drift: Option<OnDrift>) -> Self {
        let word = |drift| if drift == OnDrift::Keep { "keep" } else { "apply" };
        self.value("--drift", drift.map(|drift| word(drift).to_owned()))
    }

    /// Those that were typed when it was asked.
    fn of(ask: &Ask) -> Self {
        let none = Self::default();
        match &ask.act {
            Act::Failover { point, start, fence, force } => none
                .value("--to", Some(point.clone()))
                .fence(Some(*fence).filter(|fence| *fence != Fence::None))
                .flag("--force", *force)
                .flag("--no-start", !start)
                .grace(ask.grace)
                .network(ask.network),
            Act::Planned { start, restart, .. } => none
                .flag("--planned", true)
                .flag("--restart", *restart)
                .flag("--no-start", !start)
                .grace(ask.grace)
                .network(ask.network),
            Act::Failback { home, switch, power_on, compare, verify } => none
                .home(home)
                .switch(*switch)
                .flag("--full", *compare)
                .flag("--verify", *verify)
                .drift(home.configured.as_ref().map(|_| OnDrift::Apply))
                .flag("--no-start", !power_on)
                .grace(ask.grace)
                .network(ask.network),
            Act::Switchover { power_on } => {
                none.switch(Switch::Auto).flag("--no-start", !power_on).grace(ask.grace).network(ask.network)
            }
            Act::Start => none.network(ask.network),
            Act::Undo { force, restart, .. } => {
                none.flag(FORCE, *force).flag("--restart", *restart).network(ask.network)
            }
            Act::Commit { force } => none.flag("--force", *force),
            Act::Permanent => none,
        }
    }

    fn home(self, home: &Home) -> Self {
        let place = format!("{}:{}", home.host, home.machine);
        match home.kind {
            HomeKind::Original => self,
            HomeKind::Restored => self.value("--to", Some(place)),
            HomeKind::New => self.value("--new", Some(place)),
        }
    }

    /// What it says and the other does not; where only one of them says anything of `open`, that is no difference.
    fn beside<'o>(&'o self, other: &Self, open: Option<&str>) -> Vec<&'o str> {
        let has = |options: &Self| options.0.iter().any(|option| Some(name(option)) == open);
        let is_open = |option: &str| Some(name(option)) == open && !(has(self) && has(other));
        let all = self.0.iter().map(String::as_str);
        all.filter(|option| !other.0.iter().any(|o| o == option) && !is_open(option)).collect()
    }
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(" "))
    }
}

/// Something that was begun.
pub(in crate::verb) struct Begun {
    /// What it is, for messages.
    what: String,
    /// How the catalogue names what it is about.
    object: String,
    options: Options,
    /// An option that need not be typed again.
    open: Option<&'static str>,
}

impl Begun {
    /// An operation of a replica.
    pub(super) fn operation(ask: &Ask) -> Self {
        Self {
            what: format!("{} of {}", ask.act.op(), ask.replica),
            object: desk::object(&ask.replica),
            options: Options::of(ask),
            open: Some(open(&ask.act)),
        }
    }

    /// A run of a plan.
    pub(in crate::verb) fn plan(spec: &PlanSpec) -> Self {
        let options = Options::default().point(&spec.to).fence(spec.fence).flag("--no-start", spec.no_start);
        let options = options.flag("--cancel-job", spec.cancel_job).grace(spec.grace).network(spec.network);
        Self { what: format!("a run of plan {}", spec.plan), object: plan::object(&spec.plan), options, open: None }
    }

    /// Refuses to go on with what was begun in another way than it is asked for now.
    ///
    /// # Errors
    /// [`Code::State`], with both.
    pub(in crate::verb) fn same(&self, session: impl std::fmt::Display, typed: &Options) -> Result<()> {
        let begun = &self.options;
        let (theirs, mut ours) = (begun.beside(typed, self.open), typed.beside(begun, self.open));
        ours.retain(|option| *option != FORCE);
        if theirs.is_empty() && ours.is_empty() {
            return Ok(());
        }
        let said = |options: &[&str]| if options.is_empty() { "nothing of that".to_owned() } else { options.join(" ") };
        let what = format!(
            "{} has not ended and goes on as it was begun: session {session} was told {}, this command says {}",
            self.what,
            said(&theirs),
            said(&ours)
        );
        let help = format!("aquifer sessions {session} --cancel    # or the command as it was typed first");
        Err(Fail::new(Code::State, what).at(&self.object).help(help))
    }

    /// Whether it was begun without that word, and is asked for with it now.
    pub(super) fn is_forced_by(&self, typed: &Options) -> bool {
        let has = |options: &Options| options.0.iter().any(|option| option == FORCE);
        has(typed) && !has(&self.options)
    }

    /// The same for somebody who says that it goes on: only what they say of it counts.
    ///
    /// # Errors
    /// As [`Begun::same`].
    pub(in crate::verb) fn goes_on(&self, session: impl std::fmt::Display, typed: &Options) -> Result<()> {
        let unsaid = Options::default().value("--grace", Some(GRACE.to_owned())).network(Network::default());
        let mut said: Vec<String> = typed.beside(&unsaid, None).into_iter().map(str::to_owned).collect();
        let is_said = |option: &&String| said.iter().any(|said| name(said) == name(option));
        let rest: Vec<String> = self.options.0.iter().filter(|option| !is_said(option)).cloned().collect();
        said.extend(rest);
        self.same(session, &Options(said))
    }
}

/// What it is, with what it was told, as it is typed.
impl fmt::Display for Begun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.options.0.is_empty() { Ok(()) } else { write!(f, ", told {}", self.options) }
    }
}

/// The word that an option begins with.
fn name(option: &str) -> &str {
    option.split(' ').next().unwrap_or(option)
}

/// An option that need not be typed again: what it stands for was settled when the operation was begun.
fn open(act: &Act) -> &'static str {
    match act {
        Act::Failback { .. } | Act::Switchover { .. } => "--drift",
        _ => "--to",
    }
}

/// A duration as it is typed.
fn typed(duration: Duration) -> String {
    let ms = duration.as_millis();
    let units = [(3_600_000, "h"), (60_000, "m"), (1000, "s")];
    let whole = units.into_iter().find(|(unit, _)| ms > 0 && ms.is_multiple_of(*unit));
    match whole {
        Some((unit, name)) => format!("{}{name}", ms / unit),
        None if ms == 0 => "0s".to_owned(),
        None => format!("{ms}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(act: Act) -> Ask {
        let grace = Duration::from_secs(20);
        Ask { replica: "a".into(), reason: None, grace, network: Network::User, seen: None, act }
    }

    #[test]
    fn durations_are_said_as_they_are_typed() {
        let all = [(0, "0s"), (1500, "1500ms"), (20_000, "20s"), (900_000, "15m"), (7_200_000, "2h")];
        for (ms, text) in all {
            assert_eq!(typed(Duration::from_millis(ms)), text);
            assert_eq!(crate::units::parse_duration(text).expect("read"), Duration::from_millis(ms));
        }
    }

    #[test]
    fn what_was_told_nothing_says_no_more() {
        assert_eq!(Begun::operation(&ask(Act::Permanent)).to_string(), "permanent of a");
        let undo = Act::Undo { force: false, restart: false, way_home: false };
        assert_eq!(Begun::operation(&ask(undo)).to_string(), "undo of a, told --network user");
    }

    #[test]
    fn force_may_be_said_later_and_not_taken_back() {
        let undo = |force| Begun::operation(&ask(Act::Undo { force, restart: false, way_home: false }));
        let typed = Options::default().network(Network::User);
        let forced = typed.clone().flag(FORCE, true);
        assert!(undo(false).same(7, &forced).is_ok() && undo(false).is_forced_by(&forced));
        assert!(undo(true).same(7, &typed).is_err() && !undo(true).is_forced_by(&forced));
    }

    #[test]
    fn what_is_typed_again_is_the_same_and_what_is_typed_otherwise_is_not() {
        let begun = ask(Act::Failover { point: "0190".into(), start: true, fence: Fence::Graceful, force: false });
        let again = Options::default().fence(Some(Fence::Graceful)).grace(begun.grace).network(Network::User);
        let differs = |typed: &Options| {
            let begun = Options::of(&begun);
            (begun.beside(typed, Some("--to")).join(" "), typed.beside(&begun, Some("--to")).join(" "))
        };
        assert_eq!(differs(&again), (String::new(), String::new()), "which point it is was settled when it was begun");
        let other = again.clone().value("--to", Some("0191".into())).flag("--no-start", true);
        assert_eq!(differs(&other), ("--to 0190".into(), "--to 0191 --no-start".into()));
        let planned = Options::default().flag("--planned", true).grace(begun.grace).network(Network::None);
        assert_eq!(differs(&planned), ("--fence graceful --network user".into(), "--planned --network none".into()));
    }

    #[test]
    fn who_says_only_that_a_run_goes_on_goes_on_with_it_as_it_was_begun() {
        let (grace, network) = (Duration::from_secs(600), Network::None);
        let (plan, to) = ("all".into(), "latest".into());
        let (fence, reason, resumes) = (None, None, None);
        let spec = PlanSpec { plan, to, grace, network, reason, fence, no_start: false, cancel_job: false, resumes };
        let begun = Begun::plan(&spec);
        let plain = Options::default().grace(Duration::from_secs(900)).network(Network::User);
        assert!(begun.goes_on(7, &plain).is_ok() && begun.same(7, &plain).is_err());
        assert!(begun.same(7, &Options::default().point("latest").grace(grace).network(network)).is_ok());
        let other = begun.goes_on(7, &plain.point("latest~1")).expect_err("another point").what;
        assert!(other.contains("session 7 was told nothing of that, this command says --to latest~1"), "{other}");
        let shorter = Options::default().grace(Duration::from_secs(1)).network(Network::User);
        let other = begun.goes_on(7, &shorter).expect_err("less time").what;
        assert!(other.contains("was told --grace 10m, this command says --grace 1s"), "{other}");
    }

    #[test]
    fn a_change_of_sides_is_the_rest_of_a_way_home_that_is_to_change_them() {
        let typed = Options::default().switch(Switch::Auto).grace(Duration::from_secs(20)).network(Network::User);
        assert_eq!(Options::of(&ask(Act::Switchover { power_on: true })), typed);
    }
}
