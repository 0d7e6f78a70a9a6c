//! One manager for one machine: a process that is held enters, a lock that lasts as long as this process at most leaves.
//!
//! The lock is flock(2) on `PID-START.lock`, so it goes with its holder however that ends, and a file that is left over
//! holds nobody; those of machines that have ended are removed by the next manager. The file's text has a line with the holder's number,
//! which is for the message only; and, once somebody is about to change that, one with the bytes that the machine's balloon was asked to
//! hold before, and one with those that its virtio-mem devices were asked to bring.
//! Who lets the machine go removes the file; who takes the lock of one that was killed finds there what has to be given back.

use crate::Refusal;
use crate::held::Held;
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::{self, StartTime};
use plimsoll_types::ByteCount;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, mkdir, open, openat};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How often a file that was removed between opening and locking is made again.
const TRIES: u32 = 8;
const FOLDER_MODE: Mode = Mode::RWXU;

/// The right to manage a machine. Dropping it gives it up.
#[derive(Debug)]
pub struct AttachLock {
    path: PathBuf,
    /// Holds the lock.
    file: File,
}

impl AttachLock {
    /// Takes the lock of that process in [`lock_folder`].
    pub fn acquire(held: &Held) -> Result<Self, Refusal> {
        Self::acquire_in(&lock_folder(), held)
    }

    /// Takes the lock of that process in a folder, which is made if it is not there and must be this user's own.
    pub fn acquire_in(folder: &Path, held: &Held) -> Result<Self, Refusal> {
        let directory =
            own_folder(folder).map_err(|source| Refusal::Lock { path: folder.to_owned(), source })?;
        let name = format!("{}-{}.lock", held.process().get(), held.start().0);
        let path = folder.join(&name);
        for _ in 0..TRIES {
            match try_lock(&directory, &name) {
                Ok(Locked::Ours(file)) => {
                    sweep(folder, &directory);
                    return Ok(Self { path, file });
                }
                Ok(Locked::Theirs(holder)) => {
                    return Err(Refusal::AlreadyAttached { process: held.process(), holder });
                }
                Ok(Locked::Removed) => {}
                Err(source) => return Err(Refusal::Lock { path, source }),
            }
        }
        let source = io::Error::other("it was removed each time it was opened");
        Err(Refusal::Lock { path, source })
    }

    /// What the machine's balloon was asked to hold before anybody who has had the lock and did not give it up changed that.
    pub fn balloon(&self) -> Option<ByteCount> {
        line(&self.file, 1)
    }

    /// The same of what its virtio-mem devices were asked to bring.
    pub fn plugged(&self) -> Option<ByteCount> {
        line(&self.file, 2)
    }

    /// Remembers both for whoever has the lock when this process is killed; of devices nothing where there are none.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep(&self, balloon: ByteCount, plugged: Option<ByteCount>) -> io::Result<()> {
        let kept: Vec<ByteCount> = [Some(balloon), plugged].into_iter().flatten().collect();
        write(&self.file, &kept)
    }

    /// The lock file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for AttachLock {
    fn drop(&mut self) {
        // Still locked: whoever has opened the file meanwhile finds after locking it that it is gone.
        drop(fs::remove_file(&self.path));
    }
}

enum Locked {
    Ours(File),
    Theirs(String),
    Removed,
}

fn try_lock(directory: &OwnedFd, name: &str) -> io::Result<Locked> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?);
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(Locked::Theirs(holder(&file))),
        Err(errno) => return Err(errno.into()),
    }
    if fstat(&file)?.st_nlink == 0 {
        return Ok(Locked::Removed);
    }
    let kept: Vec<ByteCount> = [1, 2].into_iter().map_while(|place| line(&file, place)).collect();
    write(&file, &kept)?;
    Ok(Locked::Ours(file))
}

/// The first bytes of a lock's file: all there is.
fn text(file: &File) -> String {
    let mut bytes = [0; 64];
    let length = file.read_at(&mut bytes, 0).unwrap_or(0);
    String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned()
}

/// A size in a lock's file.
fn line(file: &File, place: usize) -> Option<ByteCount> {
    text(file).lines().nth(place)?.parse().ok().map(ByteCount)
}

/// In one piece, over what is there: a holder may be killed at any instant.
fn write(file: &File, kept: &[ByteCount]) -> io::Result<()> {
    let kept: String = kept.iter().map(|bytes| format!("{}\n", bytes.0)).collect();
    let text = format!("{}\n{kept}", ProcessId::own().get());
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))
}

/// Removes what killed managers have left of machines that have ended.
fn sweep(folder: &Path, directory: &OwnedFd) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some((name, (process, start))) = name.to_str().and_then(|name| Some((name, machine_of(name)?)))
        else {
            continue;
        };
        let has_ended = !procfs::lives(process, start).unwrap_or(false);
        // One that is held is its holder's to remove.
        if has_ended && let Ok(Locked::Ours(_held)) = try_lock(directory, name) {
            drop(fs::remove_file(entry.path()));
        }
    }
}

/// Whose lock a file of that name is.
fn machine_of(name: &str) -> Option<(ProcessId, StartTime)> {
    procfs::parse_identity(name.strip_suffix(".lock")?)
}

/// Who holds the lock, as far as the file says: it may just be written.
fn holder(file: &File) -> String {
    let number = text(file).lines().next().and_then(|number| number.parse().ok());
    match number.and_then(ProcessId::new) {
        Some(process) => process.to_string(),
        None => "another process".to_owned(),
    }
}

/// Where locks are: `/run/plimsoll/attach` for root, below `$XDG_RUNTIME_DIR` or `/tmp` for others.
pub fn lock_folder() -> PathBuf {
    let user = rustix::process::geteuid();
    if user.is_root() {
        return PathBuf::from("/run/plimsoll/attach");
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(runtime) => Path::new(&runtime).join("plimsoll/attach"),
        None => PathBuf::from(format!("/tmp/plimsoll-{}/attach", user.as_raw())),
    }
}

/// Makes and opens the folder and the one above it. Below /tmp anybody could have made them first: they must be this
/// user's and no links.
fn own_folder(folder: &Path) -> io::Result<OwnedFd> {
    if let Some(above) = folder.parent() {
        make(above)?;
    }
    make(folder)
}

fn make(folder: &Path) -> io::Result<OwnedFd> {
    match mkdir(folder, FOLDER_MODE) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = open(folder, flags, Mode::empty())?;
    let found = fstat(&directory)?;
    if found.st_uid != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the directory belongs to another user"));
    }
    if found.st_mode & 0o022 != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others may write to the directory"));
    }
    Ok(directory)
}
