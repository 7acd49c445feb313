//! How long a source takes to become local, and what a reader beside it notices.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aquifer_vdisk::{
    Disk,
    hydrate::{HydrateState, Hydrator, Pace},
    overlay::{Overlay, OverlayOf, OverlayOptions},
};
use hdrhistogram::Histogram;
use serde::Serialize;

use super::{
    Args,
    copies::{self, Purpose, Scratch, Whole},
    generator::{Order, latencies},
};
use crate::{
    context::Context,
    copy,
    fail::{Code, Fail, Result},
    source::{SourceOptions, select},
    units,
};

/// How often an interruption is looked for.
const TICK: Duration = Duration::from_millis(100);

#[derive(Serialize)]
struct Hydrated {
    seconds: f64,
    bytes_used: u64,
    bytes_per_second: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    victim_p50_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    victim_p99_us: Option<f64>,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    copies::check_peers(args, Purpose::Hydration)?;
    let selection = select(context, &args.target, &SourceOptions::default())?;
    let selected = selection.single()?;
    let chain = selected.open_chain(&context.cache()?)?;
    let used = copy::used_bytes(&Disk::read_only(&selected.name, Arc::clone(&chain)))?;
    if args.dry.dry_run {
        context.out.line(format_args!("would fill an overlay with {}", units::bytes(used)));
        return Ok(());
    }
    let folder = Scratch::make()?;
    let of = OverlayOf { size: chain.size(), chain: chain.fingerprint()? };
    let overlay = Overlay::create(folder.path(), of, OverlayOptions::default())?;
    let disk = Arc::new(Disk::writable(&selected.name, chain, overlay)?);
    let done = AtomicBool::new(false);
    let duration = units::parse_duration(&args.duration)?;
    let (took, latency) = thread::scope(|scope| -> Result<_> {
        let victim = (args.victim > 0).then(|| scope.spawn(|| read_beside(&disk, args.victim, &done)));
        let start = Instant::now();
        let outcome = if args.paused {
            while start.elapsed() < duration && !stop.wait(TICK) {}
            Ok(())
        } else {
            let hydrator = Hydrator::start(Arc::clone(&disk), Pace::default())?;
            finish(context, &hydrator)
        };
        let took = start.elapsed();
        done.store(true, Ordering::Relaxed);
        let latency = victim.and_then(|victim| victim.join().ok());
        outcome.map(|()| (took, latency))
    })?;
    let at = |q: f64| latency.as_ref().map(|h| Duration::from_nanos(h.value_at_quantile(q)).as_secs_f64() * 1e6);
    let rate = u128::from(used) * 1000 / took.as_millis().max(1);
    let result = Hydrated {
        seconds: took.as_secs_f64(),
        bytes_used: used,
        bytes_per_second: u64::try_from(rate).unwrap_or(u64::MAX),
        victim_p50_us: at(0.5),
        victim_p99_us: at(0.99),
    };
    context.out.record("hydrated", &result);
    if !args.paused {
        let (used, rate) = (units::bytes(used), units::bytes(result.bytes_per_second));
        context.out.line(format_args!("local and durable after {:.2} s: {used}, {rate}/s", result.seconds));
    }
    if let (Some(p50), Some(p99)) = (result.victim_p50_us, result.victim_p99_us) {
        context.out.line(format_args!("reader beside it: p50 {p50:.0} us, p99 {p99:.0} us"));
    }
    drop(disk);
    let mut sides = vec![Whole { side: "aquifer".to_owned(), seconds: result.seconds, bytes_stored: None }];
    for name in args.peer.iter().filter(|_| !args.paused) {
        stop.check()?;
        sides.push(copies::measure(name, Purpose::Hydration, selected, folder.path())?);
    }
    copies::report(context, args, "hydrate", &sides)
}

fn finish(context: &Context, hydrator: &Hydrator) -> Result<()> {
    let stop = context.stop()?;
    loop {
        match hydrator.wait(Some(TICK)) {
            HydrateState::Done => return Ok(()),
            HydrateState::Running => stop.check()?,
            state => return Err(Fail::new(Code::Bug, format!("hydration ended as {state:?}"))),
        }
    }
}

/// Reads 4 KiB at random places, so many times a second, until told to stop.
fn read_beside(disk: &Disk, per_second: u32, done: &AtomicBool) -> Histogram<u64> {
    let mut latency = latencies();
    let mut order = Order(7);
    let mut page = [0u8; 4096];
    let places = (disk.size() / 4096).max(1);
    let gap = Duration::from_secs(1) / per_second.max(1);
    let mut due = Instant::now();
    while !done.load(Ordering::Relaxed) {
        due += gap;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let start = Instant::now();
        if disk.read(order.next() % places * 4096, &mut page).is_ok() {
            latency.saturating_record(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
        }
    }
    latency
}
