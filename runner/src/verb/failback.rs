//! `failback`: production gets what the replica has, in two passes, and serves again.

use jiff::Timestamp;

use super::ops::{self, Machines, Manner, Options, Wanted};
use crate::{
    catalogue::{Catalogue, Wish},
    cli::{Confirm, DryRun},
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    failback::{Drift, check_home, drift, estimate, is_no_replica, stands_still},
    operate::{self, Act, RunOfJob, target},
    replica::{
        desk::object,
        model::{Home, HomeDisk, HomeKind, ReplicaRecord, Switch},
        state::{Op, State},
    },
    units,
};

/// Options of `failback`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Replicas, or plan/NAME
    #[arg(value_name = "REPLICA", required = true)]
    pub targets: Vec<String>,
    /// Home is a machine that was restored elsewhere beforehand
    #[arg(long, value_name = "HOST:NAME")]
    pub to: Option<String>,
    /// Home is a machine that is made there
    #[arg(long, value_name = "HOST:NAME", conflicts_with = "to")]
    pub new: Option<String>,
    /// When the sides are changed: now, manual, or an RFC 3339 time [default: manual]
    #[arg(long, value_name = "WHEN", value_parser = when)]
    pub switch: Option<When>,
    /// Compare everything, whatever production itself has noted of its changes
    #[arg(long)]
    pub full: bool,
    /// Prove what production itself has noted of its changes: everything is compared as well, and nothing else may differ
    #[arg(long, conflicts_with = "full")]
    pub verify: bool,
    /// What becomes of production's description where the replica's machine has another one
    #[arg(long, value_enum, value_name = "WHAT")]
    pub drift: Option<OnDrift>,
    /// Leave production off in the end
    #[arg(long)]
    pub no_start: bool,
    /// How machines are treated.
    #[command(flatten)]
    pub machines: Machines,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

impl Args {
    fn options(&self) -> Options {
        let switch = self.switch.map_or(Switch::Manual, |When(switch)| switch);
        let options = self.machines.options().value("--to", self.to.clone()).value("--new", self.new.clone());
        let options = options.switch(switch).flag("--full", self.full).flag("--verify", self.verify);
        options.drift(self.drift).flag("--no-start", self.no_start)
    }
}

/// What becomes of production's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum OnDrift {
    /// It stays as it is
    Keep,
    /// It is described as the replica's machine is, when the sides are changed
    Apply,
}

/// When the sides are changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct When(pub Switch);

fn when(text: &str) -> Result<When, String> {
    match text {
        "now" | "auto" => Ok(When(Switch::Auto)),
        "manual" => Ok(When(Switch::Manual)),
        time => units::parse_when(time).map(|time| When(Switch::At(time))).map_err(|fail| fail.what),
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let plan = args.targets.iter().find(|name| name.starts_with("plan/"));
    if let (Some(home), true) = (args.to.as_ref().or(args.new.as_ref()), args.targets.len() > 1 || plan.is_some()) {
        let option = if args.to.is_some() { "--to" } else { "--new" };
        let what = format!("{option} {home} is one machine, and several replicas cannot come home to it");
        let fail = Fail::new(Code::Usage, what);
        return Err(match args.targets.first().filter(|_| plan.is_none()) {
            Some(first) => fail.help(format!("aquifer failback {} {option} {}", quoted(first), quoted(home))),
            None => fail.help("aquifer replicas"),
        });
    }
    if let ([name], None) = (args.targets.as_slice(), plan)
        && let Some(When(switch)) = args.switch
        && reschedule(context, args, name, switch)?
    {
        return Ok(());
    }
    let ops = [Op::Failback, Op::Switchover];
    let manner = Manner {
        dry: &args.dry,
        confirm: Some(&args.confirm),
        run: RunOfJob::Ends,
        ops: &ops,
        options: args.options(),
    };
    ops::carry_out(context, &args.targets, &manner, |catalogue, record| {
        if record.state == State::ReadyToSwitch {
            return switch(context, catalogue, args, record);
        }
        begin(context, catalogue, args, record)
    })
}

fn begin(context: &Context, catalogue: &Catalogue, args: &Args, record: &ReplicaRecord) -> Result<Wanted> {
    // The state is what is wrong first; a target is looked for only where one is needed.
    ops::allowed(record, Op::Failback)?;
    let (kind, word) = match (&args.to, &args.new) {
        (Some(word), _) => (HomeKind::Restored, Some(word.as_str())),
        (_, Some(word)) => (HomeKind::New, Some(word.as_str())),
        _ => (HomeKind::Original, None),
    };
    let mut home = target(context, record, kind, word)?;
    is_no_replica(record, &home)?;
    if kind != HomeKind::New {
        settle_drift(context, args, record, &mut home)?;
    }
    operate::refuse_backup(catalogue, &record.machine)?;
    let notes = check_home(record, &home, ops::runs(context, &home.folder)?, &context.cache()?)?;
    let switch = args.switch.map_or(Switch::Manual, |When(switch)| switch);
    let loss = (kind != HomeKind::New).then(|| {
        let comes = |disk: &&HomeDisk| record.failover.iter().flat_map(|f| &f.tops).any(|top| top.disk == disk.disk);
        let files: Vec<String> = home.disks.iter().filter(comes).map(|disk| disk.path.display().to_string()).collect();
        let since = record.failover.as_ref().map(|failover| failover.since.to_string()).unwrap_or_default();
        format!(
            "{} of {} becomes what the replica has: what was written there and is not in the replica is lost ({}; the replica serves since {since})",
            home.machine,
            home.host,
            files.join(", "),
        )
    });
    Ok(Wanted {
        ask: args.machines.ask(
            &record.name,
            Act::Failback { home, switch, power_on: !args.no_start, compare: args.full, verify: args.verify },
        ),
        loss,
        notes,
    })
}

/// Lists what a way home does not send by itself, and does with it what was said.
fn settle_drift(context: &Context, args: &Args, record: &ReplicaRecord, home: &mut Home) -> Result<()> {
    let Drift { lines, apply, made } = drift(record, home, &context.cache()?)?;
    if lines.is_empty() {
        return Ok(());
    }
    context
        .out
        .record("drift", &serde_json::json!({ "replica": record.name, "home": home.machine, "differences": lines }));
    lines.iter().for_each(|line| context.out.say(format_args!("{}: {line}", record.name)));
    match args.drift {
        Some(OnDrift::Keep) if made.is_empty() => {}
        Some(OnDrift::Keep) => {
            let names: Vec<_> = made.iter().map(|disk| disk.disk.as_str()).collect();
            let what = format!("{} has not got {}: what is there would not come home", home.machine, names.join(", "));
            let help = format!("aquifer failback {} --drift apply    # makes it", quoted(&record.name));
            return Err(Fail::new(Code::ConfigDrift, what).at(home.folder.display()).help(help));
        }
        Some(OnDrift::Apply) => {
            home.configured = apply;
            home.made = made.iter().map(|disk| disk.disk.clone()).collect();
            home.disks.extend(made);
        }
        None => {
            let what = format!("{} is described differently at home: {}", record.name, lines.join("; "));
            let help = if made.is_empty() { "--drift keep" } else { "--drift apply" };
            return Err(Fail::new(Code::ConfigDrift, what).at(home.folder.display()).help_again(help));
        }
    }
    Ok(())
}

/// The second pass of a way home that waits for it.
fn switch(context: &Context, catalogue: &Catalogue, args: &Args, record: &ReplicaRecord) -> Result<Wanted> {
    if args.switch != Some(When(Switch::Auto)) {
        let what = format!("{} waits for the change of sides", record.name);
        return Err(Fail::new(Code::State, what).at(object(&record.name)).help_again("--switch now"));
    }
    if let Some(failback) = &record.failback {
        stands_still(record, ops::runs(context, &failback.home.folder)?)?;
    }
    let estimate = estimate(record);
    context.out.record("estimate", &estimate);
    context.out.say(format_args!("{}: {estimate}", record.name));
    if !args.dry.dry_run {
        unschedule(context, catalogue, &record.name)?;
    }
    let act = Act::Switchover { power_on: !args.no_start };
    Ok(Wanted::of(args.machines.ask(&record.name, act)))
}

/// Gives a way home that waits another time. Answers whether that was all there was to do.
fn reschedule(context: &Context, args: &Args, name: &str, switch: Switch) -> Result<bool> {
    let catalogue = ops::look(context, name)?;
    let record = ops::record(&catalogue, name)?;
    if record.state != State::ReadyToSwitch || switch == Switch::Auto {
        return Ok(false);
    }
    let said = match switch {
        Switch::At(time) => format!("at {time}, where `aquifer serve` or a worker runs"),
        Switch::Manual | Switch::Auto => "when somebody says so".to_owned(),
    };
    if args.dry.dry_run {
        context.out.line(format_args!("would change the sides of {name} {said}"));
        return Ok(true);
    }
    unschedule(context, &catalogue, name)?;
    if let Switch::At(time) = switch {
        let ask = args.machines.ask(name, Act::Switchover { power_on: !args.no_start });
        operate::schedule(context, &catalogue, &ask, time)?;
    }
    context.out.line(format_args!("the sides of {name} are changed {said}"));
    context.out.next(format!("aquifer failback {name} --switch now"));
    Ok(true)
}

/// Takes back a change of sides that waits for its time.
pub(super) fn unschedule(context: &Context, catalogue: &Catalogue, name: &str) -> Result<()> {
    let now = Timestamp::now();
    let waiting = catalogue.open_work()?.into_iter().filter(|work| {
        work.object == object(name) && work.kind == operate::KIND && work.run_at > now && work.attempts == 0
    });
    for session in waiting.filter_map(|work| work.session) {
        catalogue.wish(session, Wish::Cancel, &context.user(), Some("somebody decided otherwise"))?;
    }
    Ok(())
}
