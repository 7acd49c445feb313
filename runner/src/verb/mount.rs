//! `mount`: serves the disks of a source over NBD, as files, as loop devices or to a hypervisor's vhost-user devices,
//! until it is told to stop or the command it serves ends.
//!
//! Invariants
//! - The source is opened read-only; writes go to an overlay that is thrown away, or kept where
//!   `--overlay` says.
//! - Whatever was made for serving (sockets, scratch overlays) is gone when the verb ends.
//! - Nothing is printed as serving before its door answers.
//!
//! Not here: recovery sessions, which outlive the command.

mod child;
mod detach;
mod doors;
mod reclaim;
mod scratch;

use std::{path::PathBuf, sync::Arc, time::Duration};

use aquifer_vdisk::Disk;
use jiff::Timestamp;

use self::{
    doors::Doors,
    scratch::{Outlives, Scratch},
};
use crate::{
    cli::DryRun,
    context::Context,
    fail::Result,
    mounts::{Listed, Mount},
    source::{Selection, SourceOptions, select},
    units,
};

/// Options of `mount`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to serve
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Which disks, and how they are read.
    #[command(flatten)]
    pub options: SourceOptions,
    /// Serve over NBD at unix:PATH, tcp:HOST:PORT or an NBD URI [default: a private unix socket]
    #[arg(long, value_name = "ADDR")]
    pub nbd: Option<String>,
    /// Certificates for TLS: a folder with ca-cert.pem, server-cert.pem and server-key.pem
    #[arg(long, value_name = "DIR", requires = "nbd")]
    pub tls: Option<PathBuf>,
    /// Serve each disk as a file in this folder, which is made if need be; without --nbd, only there
    #[arg(long, value_name = "DIR")]
    pub fuse: Option<PathBuf>,
    /// Serve each disk to a hypervisor's vhost-user-blk device at a socket DISK.sock in this folder, which is made if need
    /// be; without --nbd, only there
    #[arg(long, value_name = "DIR")]
    pub vhost_user: Option<PathBuf>,
    /// Attach each disk to a loop device, so that mount, fdisk and fsck work on it; needs root
    #[arg(long = "loop")]
    pub loops: bool,
    /// Take writes into an overlay; the source is never written
    #[arg(long)]
    pub writable: bool,
    /// Keep that overlay in this folder, and go on from what it holds
    #[arg(long, value_name = "DIR", requires = "writable")]
    pub overlay: Option<PathBuf>,
    /// Serve only while this shell command runs; it finds the address in $uri. Its exit code is passed on
    #[arg(long, value_name = "CMD", conflicts_with = "detach")]
    pub run: Option<String>,
    /// Return once the door answers, and go on serving in the background
    #[arg(long)]
    pub detach: bool,
    /// Serve for a command line that has returned
    #[arg(long, hide = true, conflicts_with = "detach")]
    pub in_background: bool,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

/// How often a wish for a line of progress is looked for while serving.
const TICK: Duration = Duration::from_millis(500);

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let stop = context.stop()?;
    let selection = select(context, &args.source, &args.options)?;
    let place = doors::Place::of(context, args)?;
    let mut scratch = Scratch::of(args)?;
    place.check(&selection)?;
    // Before the disks are opened: their threads are spared as this one is.
    if args.loops || args.fuse.is_some() {
        let writes_here = args.loops && args.writable;
        reclaim::spare(if writes_here { reclaim::Use::WritesHere } else { reclaim::Use::Harmless })?;
    }
    if args.dry.dry_run {
        let cache = context.cache()?;
        for selected in &selection.disks {
            let disk = selected.open(&cache)?;
            let size = disk.size();
            context.out.record("plan", &serde_json::json!({ "disk": selected.name, "size": size }));
            context.out.line(format_args!("would serve {} ({})", selected.name, units::bytes(size)));
        }
        return scratch.check();
    }
    if args.detach {
        // What can be found wrong here is said here, not in a log.
        return detach::run(context);
    }
    if args.in_background {
        detach::leave_terminal()?;
    }
    // A machine goes on while its door is away.
    let outlives = if args.vhost_user.is_some() { Outlives::Door } else { Outlives::Nothing };
    let disks = open(context, &selection, &mut scratch, outlives)?;
    let doors = Doors::open(&place, &disks, &scratch)?;
    let (source, disks_served) = (args.source.clone(), doors.served().to_vec());
    let mount = Mount { source, since: Timestamp::now(), pid: std::process::id(), disks: disks_served };
    let listed = Listed::new(context, &mount)?;
    doors.announce(context, args.run.is_some());
    let outcome = match &args.run {
        Some(command) => child::run(context, command, &doors, stop),
        None => {
            context.out.say("serving until SIGINT or SIGTERM");
            while !stop.wait(TICK) {
                if crate::stop::take_status_request() {
                    context.out.say(doors.sentence());
                }
            }
            // A door is asked to stop by a signal: that is its regular end.
            Ok(())
        }
    };
    drop(listed);
    doors.close(context);
    for disk in disks.iter().filter(|disk| disk.is_writable()) {
        disk.flush()?;
    }
    drop(disks);
    // What was not to be kept goes with it.
    drop(scratch);
    outcome
}

fn open(context: &Context, selection: &Selection, scratch: &mut Scratch, outlives: Outlives) -> Result<Vec<Arc<Disk>>> {
    let cache = context.cache()?;
    let mut disks = Vec::new();
    for selected in &selection.disks {
        let chain = selected.open_chain(&cache)?;
        let disk = match scratch.overlay(context, &selected.name, &chain)? {
            Some(overlay) => scratch.lasting(Disk::writable(&selected.name, chain, overlay)?, outlives)?,
            None => Disk::read_only(&selected.name, chain),
        };
        disks.push(Arc::new(disk));
    }
    Ok(disks)
}
