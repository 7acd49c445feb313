//! `bench`: measures a disk behind any path or NBD URI, and peers in the same run with the same generator.
//!
//! Reads and writes go through our own NBD client, against our own door for a path and against whatever
//! serves a URI; `hydrate` fills a throw-away overlay from a source and `backup` a throw-away repository, and they
//! say how long that took until it was durable; `boot` recovers a throw-away machine and says when it ran.
//!
//! Invariants
//! - A source is never written: `write` takes only NBD URIs, and says that it destroys what is there.
//! - Both sides of a comparison run in this process, in turn, and the ratio comes from those two runs.
//!
//! Not here: a loaded machine's noise. Compare only what one run measured.

mod backup;
mod boot;
mod chart;
mod copies;
mod generator;
mod hydrate;
mod peer;

use std::{path::PathBuf, sync::Arc, time::Duration};

use aquifer_mount::nbd::{Address, Client, ClientOptions, Export, Server};
use serde::Serialize;

use self::generator::{Figures, Load, Work};
use crate::{
    cli::{Confirm, DryRun},
    confirm::confirm,
    context::Context,
    fail::{Code, Fail, Result},
    source::{SelectedDisk, SourceOptions, select},
    units,
};

/// Options of `bench`.
#[derive(Debug, clap::Args)]
#[command(allow_missing_positional = true)]
pub struct Args {
    /// What to measure: read, write, hydrate, backup or boot [default: read]
    #[arg(value_name = "WORK")]
    pub work: Option<String>,
    /// A SOURCE; for write an NBD URI
    #[arg(value_name = "TARGET")]
    pub target: String,
    /// Also measure this on the same image, in turn: qemu-nbd for read and write; qemu-img for hydrate; qemu-img
    /// and qemu-img-parallel for backup
    #[arg(long, value_name = "PEER", value_delimiter = ',')]
    pub peer: Vec<String>,
    /// Requests in flight on each connection
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub depth: u16,
    /// Connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub connections: u16,
    /// Bytes of each request
    #[arg(long, value_name = "SIZE", default_value = "4KiB")]
    pub block: String,
    /// How long each side runs
    #[arg(long, value_name = "TIME", default_value = "3s")]
    pub duration: String,
    /// With write: a flush after every so many writes of a connection, 0 for none
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub flush: u32,
    /// With hydrate: a reader of so many requests a second beside it, whose latency is measured
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub victim: u32,
    /// With hydrate: do not hydrate, only run the reader, for comparison
    #[arg(long)]
    pub paused: bool,
    /// With boot: measure also until the machine's console shows this
    #[arg(long, value_name = "TEXT")]
    pub until: Option<String>,
    /// With boot: how long that may take
    #[arg(long, value_name = "TIME", default_value = "10min")]
    pub limit: String,
    /// With boot: the machine's memory [default: as recover does]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<String>,
    /// Draw what was measured into this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
    /// Whether to ask.
    #[command(flatten)]
    pub confirm: Confirm,
}

#[derive(Serialize)]
struct Measured<'a> {
    side: &'a str,
    work: &'static str,
    depth: u16,
    connections: u16,
    block_bytes: u64,
    #[serde(flatten)]
    figures: &'a Figures,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    match args.work.as_deref().unwrap_or("read") {
        "read" => measure(context, args, Work::Read),
        "write" => measure(context, args, Work::Write { flush_every: args.flush }),
        "hydrate" => hydrate::run(context, args),
        "backup" => backup::run(context, args),
        "boot" => boot::run(context, args),
        other => {
            let what = format!("`{other}` cannot be measured; read, write, hydrate, backup and boot can");
            Err(Fail::new(Code::Usage, what).help("aquifer bench --help"))
        }
    }
}

fn measure(context: &Context, args: &Args, work: Work) -> Result<()> {
    peer::check(&args.peer)?;
    let load = Load {
        work,
        depth: args.depth.into(),
        connections: args.connections.into(),
        block: units::parse_bytes(&args.block)?,
        duration: units::parse_duration(&args.duration)?,
    };
    let selected = select(context, &args.target, &SourceOptions::default())?.single()?.clone();
    let is_nbd = Address::is_meant(&args.target);
    if load.is_write() && !is_nbd {
        let what = "only an NBD URI can be written to";
        return Err(Fail::new(Code::Usage, what).at(&args.target).help("aquifer mount SOURCE --writable"));
    }
    if args.dry.dry_run {
        context.out.line(format_args!("would measure {}", args.target));
        return Ok(());
    }
    if load.is_write() {
        confirm(context, &args.confirm, &format!("what is stored at {} is overwritten", args.target))?;
    }
    let ours = if is_nbd { one(&args.target.parse()?, &load)? } else { own_door(context, &selected, &load)? };
    print(context, "aquifer", args, &load, &ours);
    if ours.errors > 0 && ours.per_second == 0.0 {
        let what = format!("not one {} of {} succeeded", load.name(), units::bytes(load.block));
        return Err(Fail::new(Code::Io, what).at(&args.target));
    }
    let mut sides = vec![("aquifer".to_owned(), ours.drawn())];
    for name in &args.peer {
        let peer = peer::start(context, &selected)?;
        let theirs = one(&peer.address, &load)?;
        print(context, name, args, &load, &theirs);
        let ratio = if theirs.per_second > 0.0 { ours.per_second / theirs.per_second } else { f64::INFINITY };
        context.out.record("ratio", &serde_json::json!({ "peer": name, "ratio": ratio }));
        context.out.line(format_args!("against {name}: {ratio:.2} x"));
        sides.push((name.clone(), theirs.drawn()));
    }
    if let Some(path) = &args.svg {
        let what = format!(
            "{} {}: {} B, depth {}, {} connections",
            load.name(),
            args.target,
            load.block,
            args.depth,
            args.connections
        );
        chart::write(path, &what, &chart::groups(&Figures::DRAWN, &sides))?;
    }
    Ok(())
}

/// Serves a source by our own door while it is measured.
fn own_door(context: &Context, selected: &SelectedDisk, load: &Load) -> Result<Figures> {
    let folder = peer::Folder::make(context)?;
    let disk = Arc::new(selected.open(&context.cache()?)?);
    let server = Server::builder().export(Export::new(disk.name(), Arc::clone(&disk))).build()?;
    let address = server.listen_unix(&folder.path().join("own.sock"))?.with_export(disk.name());
    let figures = one(&address, load);
    server.stop();
    figures
}

fn one(address: &Address, load: &Load) -> Result<Figures> {
    let options = ClientOptions { reconnect: Duration::from_secs(1), ..ClientOptions::default() };
    Ok(load.run(&Arc::new(Client::connect(address, &options)?))?)
}

fn print(context: &Context, side: &str, args: &Args, load: &Load, figures: &Figures) {
    let (depth, connections, block_bytes) = (args.depth, args.connections, load.block);
    context.out.record("measured", &Measured { side, work: load.name(), depth, connections, block_bytes, figures });
    context.out.line(format_args!(
        "{side}: {:.0} {}s/s ({}/s), p50 {:.0} us, p99 {:.0} us, p99.9 {:.0} us, {} errors",
        figures.per_second,
        load.name(),
        units::bytes(figures.bytes_per_second),
        figures.p50_us,
        figures.p99_us,
        figures.p999_us,
        figures.errors,
    ));
}
