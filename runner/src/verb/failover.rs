//! `failover`: a replica takes over at a restore point.

use super::{
    ops::{self, Machines, Manner, Options, Wanted},
    plan::How,
    replicas::trouble,
};
use crate::{
    catalogue::Catalogue,
    cli::DryRun,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    failover::{can_be_copied, pick},
    host::placed::Placed,
    operate::{Act, Fence, PlannedSpec, RunOfJob, production},
    plan::{find, ready_entries},
    replica::{
        model::{PointRecord, ReplicaRecord},
        seat,
        state::{Op, State},
    },
    site::JobKind,
    source::PointRef,
    tasks::follow::at,
};

/// Options of `failover`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Replicas, or plan/NAME
    #[arg(value_name = "TARGET", required_unless_present = "plan")]
    pub targets: Vec<String>,
    /// The restore point: latest (the default), latest~2, an RFC 3339 time, or the first characters of a point's id
    #[arg(long, value_name = "POINT")]
    pub to: Option<String>,
    /// A plan of the site file: its machines take over in its order
    #[arg(long, value_name = "NAME", conflicts_with_all = ["targets", "planned"])]
    pub plan: Option<String>,
    /// Without a loss: bring the replica up to date, turn production off, copy the rest, then take over
    #[arg(long, conflicts_with = "to")]
    pub planned: bool,
    /// With --planned: start production again when it fails after production was turned off
    #[arg(long, requires = "planned")]
    pub restart: bool,
    /// What happens to production's machine first, where its host can be reached [default: none; of a plan: what it says]
    #[arg(long, value_enum, conflicts_with = "planned")]
    pub fence: Option<Fence>,
    /// Make everything ready, and leave the machine off
    #[arg(long)]
    pub no_start: bool,
    /// Also at a point whose layers were changed from outside since it was made
    #[arg(long, conflicts_with_all = ["planned", "plan"])]
    pub force: bool,
    /// Stop a run of a job that is writing to the replica
    #[arg(long)]
    pub cancel_job: bool,
    /// How machines are treated.
    #[command(flatten)]
    pub machines: Machines,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

impl Args {
    fn point(&self) -> &str {
        self.to.as_deref().unwrap_or("latest")
    }

    /// Refuses what no plan does: its machines are taken as they are, and those that can serve do.
    fn refuse_for_a_plan(&self, context: &Context, name: &str) -> Result<()> {
        let asked = [("--planned", self.planned), ("--restart", self.restart), ("--force", self.force)];
        let Some((option, _)) = asked.into_iter().find(|(_, is_asked)| *is_asked) else { return Ok(()) };
        let plan = find(context.site()?, name)?;
        let what = format!("a plan does no takeover with {option}: name the replicas of {name} instead");
        let replicas = match context.catalogue_if_there()? {
            Some(catalogue) => ready_entries(&catalogue, plan, &State::ALL)?.0,
            None => Vec::new(),
        };
        let words: Vec<_> = replicas.iter().map(|replica| quoted(replica)).collect();
        let fail = Fail::new(Code::Usage, what);
        Err(if words.is_empty() { fail } else { fail.help(format!("aquifer failover {} {option}", words.join(" "))) })
    }

    /// With the point that is meant, where one is said and there is only one replica to ask.
    fn options(&self, context: &Context) -> Result<Options> {
        // Of several each has its own: then it is not compared, and was settled when it was begun.
        let mut point = None;
        if let ([name], Some(to)) = (self.targets.as_slice(), &self.to)
            && let Some(catalogue) = context.catalogue_if_there()?
            && let Ok(found) = pick(name, &points(&catalogue, name)?, &PointRef::parse(to)?)
        {
            point = Some(found.id.to_string());
        }
        let options = self.machines.options().value("--to", point).flag("--planned", self.planned);
        let options = options.flag("--restart", self.restart).flag("--force", self.force);
        let options = options.fence(self.fence.filter(|fence| *fence != Fence::None));
        Ok(options.flag("--no-start", self.no_start))
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let plan = args.plan.as_deref().or_else(|| match args.targets.as_slice() {
        [one] => one.strip_prefix("plan/"),
        _ => None,
    });
    if let Some(plan) = plan {
        args.refuse_for_a_plan(context, plan)?;
        let (machines, to) = (args.machines.clone(), args.point().to_owned());
        let how = How { to, machines, fence: args.fence, no_start: args.no_start, cancel_job: args.cancel_job };
        return super::plan::begin(context, plan, &how, &args.dry, None);
    }
    let manner = Manner {
        dry: &args.dry,
        confirm: None,
        run: if args.cancel_job { RunOfJob::Stops } else { RunOfJob::MayStop },
        ops: &[Op::Failover, Op::PlannedFailover],
        options: args.options(context)?,
    };
    ops::carry_out(context, &args.targets, &manner, |catalogue, record| {
        if record.state.is_final() {
            ops::allowed(record, Op::Failover)?;
        }
        let act = if args.planned { planned(context, args, record)? } else { at_point(catalogue, args, record)? };
        let notes = if args.dry.dry_run { foresee(context, catalogue, record, &act)? } else { Vec::new() };
        Ok(Wanted { ask: args.machines.ask(&record.name, act), loss: None, notes })
    })
}

/// What a takeover would begin with: the point, and what becomes of production.
fn foresee(context: &Context, catalogue: &Catalogue, record: &ReplicaRecord, act: &Act) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let start = match act {
        Act::Failover { point: id, start, .. } => {
            let known = points(catalogue, &record.name)?;
            if let Some(index) = known.iter().position(|point| point.id.to_string() == *id) {
                let (earlier, from) = known.split_at(index);
                for point in from.iter().take(1) {
                    notes.push(format!("at the point {} of {}", point.id, at(point.taken)));
                    if let Some(trouble) = trouble(record, point) {
                        let what =
                            format!("the point {} of {} may be none to take over at: {trouble}", point.id, record.name);
                        context.out.warn(Code::WarnResync, what, None);
                    }
                    let lacks = point.lacks(earlier).into_iter();
                    notes.extend(lacks.map(|disk| format!("without the disk {disk}, which an earlier point had")));
                }
            }
            *start
        }
        Act::Planned { start, spec, .. } => {
            notes.push("at a point that is made of production after it is off".to_owned());
            let there = Placed::read(&spec.home)?.disks;
            let known = points(catalogue, &record.name)?;
            let last = known.last().into_iter().flat_map(|point| &point.disks);
            let gone = last.filter(|top| there.iter().all(|disk| disk.name != top.disk));
            notes.extend(gone.map(|top| format!("without the disk {}, which production has no more", top.disk)));
            *start
        }
        _ => return Ok(notes),
    };
    let (graceful, force) =
        ("its guest is asked to turn itself off, and it is turned off after the grace", "it is turned off at once");
    let then = match act {
        Act::Planned { .. } => graceful,
        Act::Failover { fence: Fence::Graceful, .. } => graceful,
        Act::Failover { fence: Fence::Force, .. } => force,
        _ => "it is left alone, with the same addresses (--fence none)",
    };
    notes.push(match ops::production_of(context, record)? {
        Some((home, true)) => format!("{home} runs: {then}"),
        Some((home, false)) => format!("{home} does not run"),
        None => "where production runs is not known here: nothing is done about it".to_owned(),
    });
    notes.push(format!("the machine of {} is {}", record.name, if start { "started" } else { "left off" }));
    Ok(notes)
}

/// The restore points of a replica in their order.
fn points(catalogue: &Catalogue, name: &str) -> Result<Vec<PointRecord>> {
    let mut points: Vec<PointRecord> =
        catalogue.points_of::<PointRecord>(name)?.into_iter().map(|row| row.record).collect();
    points.sort_by_key(|point| point.number);
    Ok(points)
}

fn at_point(catalogue: &Catalogue, args: &Args, record: &ReplicaRecord) -> Result<Act> {
    let wanted = PointRef::parse(args.point())?;
    let points = points(catalogue, &record.name)?;
    // One that failed stands on its point already. Which point is meant is settled now, not when it begins.
    let point = match &record.failover {
        Some(failed) => {
            if args.to.is_some() && pick(&record.name, &points, &wanted)?.id != failed.point {
                let what = format!("{} stands on the point {} already", record.name, failed.point);
                return Err(Fail::new(Code::State, what).help(format!("aquifer undo {}", record.name)));
            }
            failed.point.to_string()
        }
        None => pick(&record.name, &points, &wanted)?.id.to_string(),
    };
    Ok(Act::Failover { point, start: !args.no_start, fence: args.fence.unwrap_or_default(), force: args.force })
}

fn planned(context: &Context, args: &Args, record: &ReplicaRecord) -> Result<Act> {
    let site = context.site()?;
    let job = record.job.as_deref().and_then(|name| Some((name, site.jobs.get(name)?)));
    let Some((name, JobKind::Replication(job))) = job.map(|(name, job)| (name, &job.kind)) else {
        let what = format!("the site file has no job that makes {}", record.name);
        return Err(Fail::new(Code::NotFound, what).help("aquifer config show"));
    };
    let home = production(context, &record.machine)?.ok_or_else(|| {
        Fail::new(
            Code::Unsupported,
            format!("{} is not a machine of a host, so it cannot be turned off", record.machine),
        )
        .help(format!("aquifer failover {}", record.name))
    })?;
    can_be_copied(&home.folder, ops::runs(context, &home.folder)?)?;
    let replica = seat::spec(context, name, job, &record.machine)?;
    let spec = Box::new(PlannedSpec { replica, home: home.folder });
    Ok(Act::Planned { spec, start: !args.no_start, restart: args.restart })
}
