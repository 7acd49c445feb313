//! `info`: what a source holds, within a second: format, sizes, layers, partition table.
//!
//! Not here: reading of data beyond the partition table.

use aquifer_vdisk::{ChainSpec, Disk};
use serde::Serialize;

use crate::{
    context::{Context, quoted},
    copy,
    fail::Result,
    host::partition::Table,
    source::{SelectedDisk, SourceOptions, select},
    units,
};

/// Options of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to look at
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Which disk, and how it is read.
    #[command(flatten)]
    pub options: SourceOptions,
}

#[derive(Serialize)]
struct DiskRecord {
    disk: String,
    kind: String,
    size: u64,
    bytes_used: u64,
    layers: Vec<LayerRecord>,
    partition_table: &'static str,
    efi_system_partition: bool,
    partitions: u32,
}

#[derive(Serialize)]
struct LayerRecord {
    path: String,
    size: u64,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let selection = select(context, &args.source, &args.options)?;
    let cache = context.cache()?;
    for selected in &selection.disks {
        let chain = selected.open_chain(&cache)?;
        let layers: Vec<LayerRecord> = chain
            .layers()
            .iter()
            .map(|layer| LayerRecord { path: layer.label().to_owned(), size: layer.size() })
            .collect();
        let disk = Disk::read_only(&selected.name, chain);
        let (partition_table, esp, partitions) = match Table::read(&disk)? {
            Table::None => ("none", false, 0),
            Table::Mbr(kinds) => ("mbr", kinds.esp, kinds.count),
            Table::Gpt(kinds) => ("gpt", kinds.esp, kinds.count),
            Table::Damaged(_) => ("damaged", false, 0),
        };
        let record = DiskRecord {
            disk: selected.name.clone(),
            kind: kind_of(selected)?,
            size: disk.size(),
            bytes_used: copy::used_bytes(&disk)?,
            layers,
            partition_table,
            efi_system_partition: esp,
            partitions,
        };
        print(context, &record);
        context.out.record("disk", &record);
    }
    let mount = format!("aquifer mount {} --run 'qemu-img info \"$uri\"'", quoted(&args.source));
    context.out.next(mount);
    Ok(())
}

/// The format, as a person names it.
pub(crate) fn kind_of(selected: &SelectedDisk) -> Result<String> {
    Ok(match &selected.spec {
        ChainSpec::Image { format: Some(format), .. } => format.to_string(),
        ChainSpec::Image { path, format: None, .. } | ChainSpec::Member { path, .. } => {
            aquifer_vdisk::format_of(path)?.map_or_else(|| "unknown".to_owned(), |format| format.to_string())
        }
        ChainSpec::Snapshot { .. } => "fidx".into(),
        ChainSpec::Native { .. } | ChainSpec::Mixed { .. } => "aql".into(),
        ChainSpec::Nbd { .. } => "nbd".into(),
    })
}

fn print(context: &Context, record: &DiskRecord) {
    let out = &context.out;
    out.line(format_args!("disk {}", record.disk));
    out.line(format_args!("  format      {}", record.kind));
    out.line(format_args!("  size        {} ({} bytes)", units::bytes(record.size), record.size));
    out.line(format_args!("  used        {}", units::bytes(record.bytes_used)));
    let esp = if record.efi_system_partition { ", with an EFI system partition" } else { "" };
    out.line(format_args!("  partitions  {} ({}{esp})", record.partitions, record.partition_table));
    out.line(format_args!("  layers      {}, newest first", record.layers.len()));
    for layer in &record.layers {
        out.line(format_args!("    {}", layer.path));
    }
}
