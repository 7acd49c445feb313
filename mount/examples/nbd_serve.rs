//! Serves a raw image over a Unix socket until standard input ends: the smallest use of the server, and
//! what the side-by-side benches start.
//!
//! `nbd_serve IMAGE SOCKET`

use std::{error::Error, io::Read, path::Path, sync::Arc};

use aquifer_formats::{
    raw::RawLayer,
    storage::{Access, FileStorage},
};
use aquifer_mount::nbd::{Export, Server};
use aquifer_vdisk::{BlockCache, Chain, Disk};

#[expect(clippy::print_stdout, reason = "a program, not the library")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(image), Some(socket)) = (args.next(), args.next()) else { return Err("IMAGE SOCKET".into()) };
    let storage = FileStorage::open(Path::new(&image), Access::ReadOnly)?;
    let layer = RawLayer::open(Arc::new(storage))?;
    let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(256 << 20)))?;
    let disk = Arc::new(Disk::read_only(image, Arc::new(chain)));
    let server = Server::builder().export(Export::new("", disk)).build()?;
    println!("{}", server.listen_unix(Path::new(&socket))?);
    std::io::stdin().read_to_end(&mut Vec::new())?;
    server.stop();
    println!("{:?}", server.stats());
    Ok(())
}
