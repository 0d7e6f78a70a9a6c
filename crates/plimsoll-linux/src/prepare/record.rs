//! The record of what was changed, and the lock that only one run at a time holds.
//!
//! The file is `host.json` in a directory of its own (`/var/lib/plimsoll`):
//!
//! ```text
//! { "version": 1,             // of this format; a reader refuses a higher one
//!   "boot": "…",              // the kernel's boot id
//!   "stage": "preparing",     // "prepared" when all was done, "undoing" from the first revert on
//!   "request": { … },         // what was asked for, so that a second prepare can tell whether it is the same
//!   "steps": [ { "change": "add_device", … }, … ] }   // in the order they were begun; the last may not have happened
//! ```
//!
//! It is replaced by renaming a synced copy over it, and the directory is synced too: after a crash the old or the new one
//! is there, whole. The lock is one on the directory, so the kernel drops it however its holder dies and no file stays.
use super::plan::Request;
use super::{Change, DeviceId, PrepareError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const VERSION: u64 = 1;
const NAME: &str = "host.json";
/// The copy that is being written. One that a crash has left is overwritten.
const DRAFT: &str = "host.json.new";

/// How far a run has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Changes are being made.
    Preparing,
    /// All changes were made.
    Prepared,
    /// They are being reverted.
    Undoing,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Preparing => "preparing",
            Self::Prepared => "prepared",
            Self::Undoing => "undoing",
        })
    }
}

/// What was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    version: u64,
    /// The boot it was changed in.
    pub boot: String,
    /// How far the run has come.
    pub stage: Stage,
    /// What was asked for.
    pub request: Request,
    /// The changes begun, in their order.
    pub steps: Vec<Change>,
}

impl Record {
    pub(super) const fn new(boot: String, request: Request) -> Self {
        Self { version: VERSION, boot, stage: Stage::Preparing, request, steps: Vec::new() }
    }

    /// The zram device that was added.
    pub(super) fn device(&self) -> Option<DeviceId> {
        self.steps.iter().find_map(|change| match change {
            Change::AddDevice { made, .. } => *made,
            _ => None,
        })
    }
}

/// Where the record is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    directory: PathBuf,
}

impl Default for Place {
    fn default() -> Self {
        Self::at("/var/lib/plimsoll")
    }
}

impl Place {
    /// In that directory, which is made when it is needed and removed when it is empty.
    pub fn at(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// The record's file.
    pub fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    /// The record, if there is one.
    ///
    /// # Errors
    /// When it cannot be read, understood or trusted.
    pub fn load(&self) -> Result<Option<Record>, PrepareError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let path = self.path();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(PrepareError::io("read", path)(source)),
        };
        self.require_trust(
            &fs::metadata(&self.directory).map_err(PrepareError::io("look at", &self.directory))?,
        )?;
        let damaged = |source| PrepareError::DamagedRecord { path: path.clone(), source };
        // The version first: the rest of a newer record may have any form.
        let Versioned { version } = serde_json::from_slice(&text).map_err(damaged)?;
        if version > VERSION {
            return Err(PrepareError::NewerRecord { path, version, known: VERSION });
        }
        serde_json::from_slice(&text).map(Some).map_err(damaged)
    }

    /// The right to look after what is on record, which one process has at a time. `None` without a record, or while another one has
    /// it, or where this user may not know.
    pub(super) fn claim(&self) -> Result<Option<Claim>, PrepareError> {
        let path = self.path();
        // Who may not change it may not change the device either.
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) =>
            {
                return Ok(None);
            }
            Err(source) => return Err(PrepareError::io("read", path)(source)),
        };
        if !try_lock(&file, &path)? {
            return Ok(None);
        }
        let claim = Claim { file, path };
        Ok(claim.is_current().then_some(claim))
    }

    /// What is undone from a record is done with all rights: nobody else may have written it.
    fn require_trust(&self, found: &fs::Metadata) -> Result<(), PrepareError> {
        let own = rustix::process::geteuid().as_raw();
        let is_ours = [0, own].contains(&found.uid()) && found.mode() & 0o022 == 0;
        if is_ours { Ok(()) } else { Err(PrepareError::UnsafeDirectory(self.directory.clone())) }
    }

    /// Makes the directory where it is missing, and takes the lock.
    pub(super) fn lock(&self) -> Result<Lock<'_>, PrepareError> {
        let path = &self.directory;
        loop {
            match DirBuilder::new().mode(0o755).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(PrepareError::Unrecordable { path: path.clone(), source: error });
                }
                _ => {}
            }
            let directory = match File::open(path) {
                // The holder before has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(PrepareError::io("open", path))?,
            };
            if !try_lock(&directory, path)? {
                return Err(PrepareError::Locked(path.clone()));
            }
            let held = directory.metadata().map_err(PrepareError::io("look at", path))?;
            self.require_trust(&held)?;
            // Removed between our opening and locking it: the lock is of a directory that nobody else finds.
            if is_at(&held, path) {
                return Ok(Lock { place: self, directory });
            }
        }
    }
}

/// The right to look after what a record says. It goes with the record, which is replaced and never changed.
#[derive(Debug)]
pub(super) struct Claim {
    file: File,
    path: PathBuf,
}

impl Claim {
    /// Whether the record is the one that was claimed.
    pub(super) fn is_current(&self) -> bool {
        self.file.metadata().is_ok_and(|held| is_at(&held, &self.path))
    }
}

/// Locks what was opened there. False when somebody else has it.
fn try_lock(file: &File, path: &Path) -> Result<bool, PrepareError> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(source)) => Err(PrepareError::io("lock", path)(source)),
    }
}

/// Whether what is held is still what others find there.
fn is_at(held: &fs::Metadata, path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (held.dev(), held.ino()))
}

/// The right to change the record, and with it the host.
#[derive(Debug)]
pub(super) struct Lock<'a> {
    place: &'a Place,
    directory: File,
}

impl Lock<'_> {
    /// Replaces the record. When this returns, it has reached the disk.
    pub(super) fn save(&self, record: &Record) -> Result<(), PrepareError> {
        let (draft, path) = (self.place.directory.join(DRAFT), self.place.path());
        let written = self.write(record, &draft).and_then(|()| fs::rename(&draft, &path));
        let synced = written.and_then(|()| self.directory.sync_all());
        synced.map_err(|source| {
            let _ = fs::remove_file(&draft);
            PrepareError::Unrecordable { path, source }
        })
    }

    fn write(&self, record: &Record, draft: &Path) -> io::Result<()> {
        let options = OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(draft);
        let mut file = options?;
        serde_json::to_writer_pretty(&file, record)?;
        file.write_all(b"\n")?;
        file.sync_all()
    }

    /// Removes the record.
    pub(super) fn remove(&self) -> Result<(), PrepareError> {
        // A draft is nothing to anybody.
        let _ = fs::remove_file(self.place.directory.join(DRAFT));
        let path = self.place.path();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(PrepareError::io("remove the record", path)(error));
            }
            _ => {}
        }
        self.directory.sync_all().map_err(PrepareError::io("sync", &self.place.directory))
    }
}

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        // Refused while there is a record, or anything else, in it: then it stays.
        let _ = fs::remove_dir(&self.place.directory);
    }
}
