//! `recover`: runs a machine straight from a source.
//!
//! Invariants
//! - A dry run makes every decision of the real one and changes nothing.
//! - Of several machines each has its own outcome; the command fails if one of them did.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use aquifer_mount::session::{Blocks, Client, Folder, Hydrate, Options, Preallocate};
use serde_json::json;

use super::NamedSource;
use crate::{
    cli::DryRun,
    context::Context,
    fail::{Code, Fail, Result},
    host::{Host, Network, Power, Shape, firmware::Firmware},
    machine::Described,
    output::plain,
    recover::{
        self, Plan, finish,
        plan::{From, Request},
        queue::{Limit, TICK},
        record::Machine,
        shape::Wishes,
        start::{self, Started},
        view::{View, console_command, short_id},
    },
    source::{KeyOptions, SourceOptions},
    stop::Stop,
    units,
};

/// Options of `recover`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to run; several sources are several machines
    #[arg(value_name = "SOURCE", required_unless_present = "disk")]
    pub source: Vec<String>,
    /// A disk and where its content comes from; may be given several times
    #[arg(long, value_name = "NAME=SOURCE", conflicts_with = "source")]
    pub disk: Vec<NamedSource>,
    /// The machine's description: TOML or libvirt domain XML
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// Folder of the recovery; the machine's disks end here. Of several machines, the folder their folders go into
    #[arg(long, value_name = "DIR")]
    pub into: PathBuf,
    /// The machine's name [default: from its description, the repository, or the folder]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Where the machine runs
    #[arg(long, value_name = "HOST", default_value = "qemu")]
    pub host: String,
    /// Memory, like 4GiB [default: from its description, else 4GiB]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Processors [default: from its description, else 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=255))]
    pub cpus: Option<u32>,
    /// What starts it [default: from its description, else what its disks say]
    #[arg(long, value_name = "KIND", value_parser = firmware)]
    pub firmware: Option<Firmware>,
    /// A file with its UEFI variables [default: those its restore point carries, else empty ones]
    #[arg(long, value_name = "FILE")]
    pub nvram: Option<PathBuf>,
    /// Where its network cards are plugged in: user (reaches out, cannot be reached) or none
    #[arg(long, value_name = "KIND", default_value = "user", value_parser = network)]
    pub network: Network,
    /// Leave the disks where they are; fetch only what the guest reads
    #[arg(long)]
    pub no_hydrate: bool,
    /// Copy also what no file system on the disks uses [default: it is left out, and reads as zeros once all else is
    /// local; whatever is in doubt is copied]
    #[arg(long)]
    pub all_blocks: bool,
    /// Limit of the background copy, like 200MiB/s
    #[arg(long, value_name = "RATE")]
    pub rate: Option<String>,
    /// When the machine shall be independent, like 02:00 or an RFC 3339 time
    #[arg(long, value_name = "TIME", conflicts_with = "rate")]
    pub ready_by: Option<String>,
    /// Reserve the disks' whole space before the machine starts
    #[arg(long)]
    pub preallocate: bool,
    /// Return only once this is reached: running or local
    #[arg(long, value_name = "STATE", default_value = "running", value_parser = ["running", "local"])]
    pub wait: String,
    /// Go on showing progress until everything is local; an interruption leaves the machine running
    #[arg(long)]
    pub follow: bool,
    /// Memory that machines of this command may use together [default: what is available]
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<String>,
    /// Processors that machines of this command may use together [default: four for each real one]
    #[arg(long, value_name = "N")]
    pub cpu_limit: Option<u32>,
    /// Also follow backing files that lie in this folder
    #[arg(long, value_name = "DIR")]
    pub allow_backing: Vec<PathBuf>,
    /// What opens encrypted snapshots.
    #[command(flatten)]
    pub key: KeyOptions,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

fn firmware(text: &str) -> Result<Firmware, String> {
    match text {
        "bios" => Ok(Firmware::Bios),
        "uefi" => Ok(Firmware::Uefi),
        _ => Err("it is bios or uefi".into()),
    }
}

fn network(text: &str) -> Result<Network, String> {
    match text {
        "user" => Ok(Network::User),
        "none" => Ok(Network::None),
        _ => Err("it is user or none".into()),
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let began = Instant::now();
    let host = recover::host(&args.host)?;
    let requests = requests(context, args)?;
    if args.dry.dry_run {
        return dry_run(context, host, &requests);
    }
    let stop = context.stop()?;
    if let [only] = requests.as_slice() {
        let plan = Plan::new(context, host, only)?;
        let started = begin(context, &plan, began)?;
        let short = started.spec.name.clone();
        context.out.next(format!("aquifer status {short}"));
        return after(context, args, &started, stop);
    }
    several(context, args, host, &requests, stop)
}

/// One request for each machine.
fn requests(context: &Context, args: &Args) -> Result<Vec<Request>> {
    let described = args.machine.as_deref().map(Described::read).transpose()?;
    let memory = args.memory.as_deref().map(units::parse_bytes).transpose()?;
    let wishes = Wishes { memory, cpus: args.cpus, firmware: args.firmware, network: args.network };
    let options = Options {
        cache_bytes: context.cache_bytes()?,
        hydrate: if args.no_hydrate { Hydrate::Paused } else { Hydrate::On },
        blocks: if args.all_blocks { Blocks::All } else { Blocks::Used },
        rate: args.rate.as_deref().map(units::parse_rate).transpose()?.flatten(),
        ready_by: args.ready_by.as_deref().map(units::parse_when).transpose()?,
        preallocate: if args.preallocate { Preallocate::Full } else { Preallocate::No },
        ..Options::default()
    };
    let base = |from, name, into| Request {
        from,
        source_options: SourceOptions {
            allow_backing: args.allow_backing.clone(),
            key: args.key.clone(),
            ..SourceOptions::default()
        },
        name,
        described: described.clone(),
        wishes: wishes.clone(),
        nvram: args.nvram.clone(),
        into,
        options: options.clone(),
    };
    match args.source.as_slice() {
        [] => Ok(vec![base(From::Disks(args.disk.clone()), args.name.clone(), args.into.clone())]),
        [only] => Ok(vec![base(From::Source(only.clone()), args.name.clone(), args.into.clone())]),
        many => {
            if args.name.is_some() || args.machine.is_some() || args.nvram.is_some() {
                let what =
                    "--name, --machine and --nvram are for one machine, and several sources are several machines";
                return Err(Fail::new(Code::Usage, what));
            }
            let mut requests: Vec<Request> = Vec::new();
            for word in many {
                let mut name = name_of(word);
                if requests.iter().any(|r| r.name.as_deref() == Some(&name)) {
                    name = format!("{name}-{}", requests.len() + 1);
                }
                let into = args.into.join(&name);
                requests.push(base(From::Source(word.clone()), Some(name), into));
            }
            Ok(requests)
        }
    }
}

/// A machine's name out of its source's word: the machine's own, or the file's.
fn name_of(word: &str) -> String {
    let last = word.trim_end_matches('/').rsplit('/').next().unwrap_or(word);
    let plain = if word.contains('/') { last.split('.').next() } else { last.split(['@', ':']).next() };
    let good = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let name: String = plain.unwrap_or(last).chars().map(good).take(60).collect();
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) { name } else { format!("m{name}") }
}

fn dry_run(context: &Context, host: &'static dyn Host, requests: &[Request]) -> Result<()> {
    let mut failures = Failures::default();
    for request in requests {
        match Plan::new(context, host, request) {
            Ok(plan) => tell_plan(context, &plan),
            Err(fail) => failures.add(context, request, fail),
        }
    }
    failures.finish(requests.len())
}

fn tell_plan(context: &Context, plan: &Plan) {
    let shape = &plan.machine.shape;
    context.out.record(
        "plan",
        &json!({ "name": plan.name, "dir": plan.dir, "host": plan.machine.host, "firmware": plan.machine.firmware,
                 "memory": shape.memory, "cpus": shape.cpus, "disks": plan.disks, "warnings": plan.warnings }),
    );
    context.out.line(format_args!("would recover {} into {}", plan.name, plan.dir.display()));
    context.out.line(format_args!(
        "  machine  {} processors, {} memory, {} network cards",
        shape.cpus,
        units::bytes(shape.memory),
        shape.nics.len()
    ));
    context.out.line(format_args!("  firmware {}", plan.machine.firmware));
    for disk in &plan.disks {
        context.out.line(format_args!("  disk     {} ({})", disk.name, units::bytes(disk.size)));
    }
    for warning in &plan.warnings {
        context.out.line(format_args!("  note     {warning}"));
    }
}

/// Starts one machine and says where it is.
fn begin(context: &Context, plan: &Plan, began: Instant) -> Result<Started> {
    for warning in &plan.warnings {
        context.out.say(format_args!("note: {}: {warning}", plan.name));
    }
    context.out.say(format_args!("{}: preparing the overlay and the door in {}", plan.name, plan.dir.display()));
    let started = start::start(context, plan)?;
    let seconds = began.elapsed();
    let (spec, running) = (&started.spec, &started.running);
    let console = running.console.display().to_string();
    let uris: Vec<_> =
        spec.disks.iter().map(|d| json!({ "disk": d.name, "size": d.size, "uri": spec.uri(&d.name) })).collect();
    context.out.record(
        "machine",
        &json!({ "name": spec.name, "session": spec.id, "dir": spec.dir, "result": "running",
                 "seconds": seconds.as_secs_f64(), "console": console, "console_log": running.console_log,
                 "screen": running.screen, "pid": running.process.pid, "accel": running.accel,
                 "firmware": plan.machine.firmware, "disks": uris }),
    );
    let out = &context.out;
    out.line(format_args!("{} is RUNNING, {:.1} s after the command", spec.name, seconds.as_secs_f64()));
    out.line(format_args!("  session  {} ({})", short_id(&spec.id.simple().to_string()), spec.id));
    out.line(format_args!("  firmware {}, {}", plan.machine.firmware, running.accel));
    out.line(format_args!("  console  {}", console_command(&console)));
    if let Some(screen) = &running.screen {
        out.line(format_args!("  screen   vncviewer {}", screen.display()));
    }
    for disk in &spec.disks {
        out.line(format_args!("  disk     {} ({}) {}", disk.name, units::bytes(disk.size), spec.uri(&disk.name)));
    }
    out.line(format_args!("  watch    {}", out.ready(&format!("aquifer status --watch {}", spec.name))));
    out.line(format_args!("  end      {}", out.ready(&format!("aquifer finalize {} --keep", spec.name))));
    Ok(started)
}

/// What `--wait` and `--follow` ask for.
fn after(context: &Context, args: &Args, started: &Started, stop: Stop) -> Result<()> {
    if args.wait != "local" && !args.follow {
        return Ok(());
    }
    let client = Client::open(&started.spec.dir)?;
    let folder = Folder::open(&started.spec.dir)?;
    let mut last = Instant::now();
    let progress = context.out.progress("hydrating", View::of(&folder).ok().map(|v| v.used_bytes));
    let waited = finish::wait_local(&client, None, stop, &mut |_| {
        if last.elapsed() >= Duration::from_millis(500) {
            last = Instant::now();
            if let Ok(view) = View::of(&folder) {
                progress.set(view.local_bytes);
            }
        }
    });
    drop(progress);
    match waited {
        // Leaving a view is not a failure of what is viewed.
        Err(fail) if args.follow && matches!(fail.code, Code::Interrupted | Code::Terminated) => {
            context.out.say(format_args!("{} goes on without this command", started.spec.name));
            Ok(())
        }
        other => other,
    }
}

#[derive(Default)]
struct Failures {
    all: Vec<Fail>,
}

impl Failures {
    fn add(&mut self, context: &Context, request: &Request, fail: Fail) {
        let name = request.name.clone().unwrap_or_else(|| request.into.display().to_string());
        context.out.record(
            "machine",
            &json!({ "name": name, "result": "failed", "code": fail.code.name(), "what": fail.what }),
        );
        context.out.say_lines(format_args!("{}: {fail}", plain(&name)));
        self.all.push(fail);
    }

    /// One failure of one machine is the command's own; of several machines, their number is.
    fn finish(mut self, machines: usize) -> Result<()> {
        match (self.all.len(), machines) {
            (0, _) => Ok(()),
            (1, 1) => self.all.pop().map_or(Ok(()), Err),
            (failed, _) => {
                Err(Fail::new(Code::Failed, format!("{failed} of {machines} machines could not be recovered"))
                    .help("aquifer status"))
            }
        }
    }
}

/// Machines one after another, as many as the limit lets run at once.
fn several(context: &Context, args: &Args, host: &'static dyn Host, requests: &[Request], stop: Stop) -> Result<()> {
    let mut limit = Limit::of_this_host()?;
    if let Some(text) = &args.memory_limit {
        limit.memory = units::parse_bytes(text)?;
    }
    limit.cpus = args.cpu_limit.unwrap_or(limit.cpus);
    let mut failures = Failures::default();
    let mut started: Vec<Started> = Vec::new();
    for request in requests {
        let began = Instant::now();
        let outcome = Plan::new(context, host, request).and_then(|plan| {
            await_room(context, &limit, &plan, &started, stop)?;
            begin(context, &plan, began)
        });
        match outcome {
            Ok(one) => started.push(one),
            Err(fail) => failures.add(context, request, fail),
        }
    }
    context.out.next("aquifer status");
    for one in &started {
        if let Err(fail) = after(context, args, one, stop) {
            failures.all.push(fail);
        }
    }
    failures.finish(requests.len())
}

/// Waits until `plan` fits beside the machines of this command that still run.
fn await_room(context: &Context, limit: &Limit, plan: &Plan, started: &[Started], stop: Stop) -> Result<()> {
    let next = &plan.machine.shape;
    if !limit.holds(next) {
        context.out.warn(
            Code::WarnHost,
            format!("{} alone is larger than the limit; it starts when nothing else of this command runs", plan.name),
            None,
        );
    }
    let mut told = false;
    loop {
        stop.check()?;
        let running: Vec<Shape> = started.iter().filter_map(living).collect();
        if limit.admits(&running, next) {
            return Ok(());
        }
        if !told {
            told = true;
            context.out.record("machine", &json!({ "name": plan.name, "result": "queued" }));
            let used = running.iter().map(|s| s.memory).sum();
            context.out.say(format_args!(
                "{} is QUEUED: it needs {} beside {} of {}; it starts when another machine is off",
                plan.name,
                units::bytes(next.memory),
                units::bytes(used),
                units::bytes(limit.memory)
            ));
        }
        stop.wait(TICK);
    }
}

/// The shape of a machine that is not off. One that cannot be looked at counts as running.
fn living(started: &Started) -> Option<Shape> {
    let machine = Folder::open(&started.spec.dir).and_then(|folder| folder.load()).ok();
    let machine = machine.and_then(|spec| Machine::of(&spec).ok().flatten())?;
    (!matches!(machine.power(), Ok(Power::Off))).then_some(machine.shape)
}

#[cfg(test)]
mod tests {
    use super::name_of;

    #[test]
    fn machines_are_named_after_their_source() {
        for (word, name) in [
            ("/mnt/old/db01.qcow2", "db01"),
            ("./web.2026.qcow2", "web"),
            ("db01@latest:vda", "db01"),
            ("db01", "db01"),
            ("nbd+unix:///vda?socket=/run/x", "x"),
            ("/images/.hidden", "m"),
            ("/images/a b", "a_b"),
        ] {
            assert_eq!(name_of(word), name, "{word}");
        }
    }
}
