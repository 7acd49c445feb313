//! The file an export writes: nameless until it is whole.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, file::File as ImagoFile, qcow2::Qcow2,
};
use rustix::fs::{AtFlags, CWD, linkat};

use crate::{
    context::quoted,
    fail::{Code, Fail, Result},
    units,
};

/// The format of the new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OutFormat {
    Raw,
    Qcow2,
}

impl OutFormat {
    /// By the name's ending, which is a person's word and no guess.
    pub(super) fn of(path: &Path) -> Result<Self> {
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.is_dir() {
            let folder = path.display().to_string();
            return Err(Fail::new(Code::Usage, format!("{folder} is a folder; OUT is the new file"))
                .at(&folder)
                .help(format!("aquifer export SOURCE {}/OUT.qcow2", quoted(folder.trim_end_matches('/')))));
        }
        match path.extension().and_then(|e| e.to_str()) {
            Some("raw" | "img") => Ok(Self::Raw),
            Some("qcow2") => Ok(Self::Qcow2),
            _ => Err(Fail::new(Code::Usage, format!("{} ends neither in .raw nor in .qcow2", path.display()))
                .help(format!("aquifer export SOURCE {}", quoted(&format!("{}.qcow2", path.display()))))),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Whether the name is free and its folder there.
pub(super) fn check_place(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_ok() {
        return Err(Fail::new(Code::Exists, format!("{} exists already", path.display())).at(path.display()));
    }
    let folder = folder_of(path);
    fs::metadata(&folder).map(drop).map_err(|e| Fail::io(folder.display(), "write into", &e))
}

/// Whether `need` bytes fit beside what is there.
pub(super) fn check_space(path: &Path, need: u64) -> Result<()> {
    let folder = folder_of(path);
    let stat = rustix::fs::statvfs(&folder).map_err(|e| Fail::io(folder.display(), "look at", &e.into()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < need {
        let what = format!("{} are needed and {} are free", units::bytes(need), units::bytes(free));
        return Err(Fail::new(Code::Capacity, what).at(folder.display()).help(format!("df -h {}", folder.display())));
    }
    Ok(())
}

fn folder_of(path: &Path) -> PathBuf {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    parent.unwrap_or(Path::new(".")).to_path_buf()
}

/// A file under way.
pub(super) struct Target {
    path: PathBuf,
    /// The name it has meanwhile, on file systems that need one.
    temporary: Option<PathBuf>,
    file: File,
    image: Image,
}

enum Image {
    Raw,
    Qcow2(FormatAccess<ImagoFile>),
}

impl Target {
    /// Begins a file of `size` bytes that will be called `path`.
    pub(super) fn create(path: &Path, format: OutFormat, size: u64) -> Result<Self> {
        let failed = |e: io::Error| Fail::io(path.display(), "create", &e);
        let (file, temporary) = nameless(path).map_err(failed)?;
        let mut target = Self { path: path.to_path_buf(), temporary, file, image: Image::Raw };
        match format {
            OutFormat::Raw => target.file.set_len(size).map_err(failed)?,
            OutFormat::Qcow2 => {
                let storage = target.file.try_clone().and_then(ImagoFile::try_from).map_err(failed)?;
                let image = Qcow2::<ImagoFile>::create_builder(storage)
                    // QEMU counts in sectors and leaves out what is less than one at the end.
                    .size(size.next_multiple_of(512))
                    .create_open(DenyImplicitOpenGate::default(), |file| {
                        Ok(Qcow2::<ImagoFile>::builder(file).backing(None).write(true))
                    })
                    .map_err(failed)?;
                target.image = Image::Qcow2(FormatAccess::new(image));
            }
        }
        Ok(target)
    }

    /// Stores bytes at their place; any number of threads.
    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = match &self.image {
            Image::Raw => self.file.write_all_at(bytes, offset),
            Image::Qcow2(image) => image.write(bytes, offset),
        };
        written.map_err(|e| Fail::io(self.path.display(), "write", &e).offset(offset))
    }

    /// Makes it durable and gives it its name, if that is still free.
    pub(super) fn finish(mut self) -> Result<()> {
        let failed = |e: io::Error| Fail::io(self.path.display(), "finish", &e);
        if let Image::Qcow2(image) = &self.image {
            image.flush().map_err(failed)?;
            image.sync().map_err(failed)?;
        }
        self.file.sync_all().map_err(failed)?;
        match self.temporary.take() {
            None => {
                let open = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                linkat(CWD, &open, CWD, &self.path, AtFlags::SYMLINK_FOLLOW).map_err(|e| failed(e.into()))?;
            }
            Some(temporary) => {
                let named =
                    rustix::fs::renameat_with(CWD, &temporary, CWD, &self.path, rustix::fs::RenameFlags::NOREPLACE);
                if let Err(error) = named {
                    self.temporary = Some(temporary);
                    return Err(failed(error.into()));
                }
            }
        }
        let folder = folder_of(&self.path);
        File::open(&folder).and_then(|f| f.sync_all()).map_err(|e| Fail::io(folder.display(), "sync", &e))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            // The failure that led here is the one to report.
            let _ = fs::remove_file(temporary);
        }
    }
}

/// A file without a name in the folder of `path`; with a temporary one where the file system needs it.
fn nameless(path: &Path) -> io::Result<(File, Option<PathBuf>)> {
    let folder = folder_of(path);
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().custom_flags(libc::O_TMPFILE).open(&folder) {
        Ok(file) => Ok((file, None)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::ENOENT)) => {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("out");
            let temporary = folder.join(format!(".{name}.{}.part", std::process::id()));
            Ok((options.create_new(true).open(&temporary)?, Some(temporary)))
        }
        Err(error) => Err(error),
    }
}
