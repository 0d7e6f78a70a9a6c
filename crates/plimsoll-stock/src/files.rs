//! The files of one guest, in a folder that goes with it.
//!
//! Enters: who QEMU is. Leaves: paths. What must never happen: somebody
//! else than QEMU's user and root speaking on a guest's sockets. The folder is its user's alone.
use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// How much of a log an error quotes.
const QUOTED_BYTES: usize = 2000;

/// The folder.
#[derive(Debug)]
pub(crate) struct Files {
    folder: TempDir,
    user: Option<u32>,
}

impl Files {
    /// A folder for a QEMU of this user, or of the caller's.
    pub(crate) fn create(user: Option<u32>) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("plimsoll-guest-").tempdir()?;
        let files = Self { folder, user };
        files.give(files.folder.path())?;
        Ok(files)
    }

    /// Makes a file QEMU's own.
    pub(crate) fn give(&self, path: &Path) -> io::Result<()> {
        self.user.map_or(Ok(()), |user| chown(path, Some(user), None))
    }

    /// Writes a file for QEMU to read.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        fs::write(path, bytes)?;
        self.give(path)
    }

    /// A socket that QEMU will connect to.
    pub(crate) fn listen(&self, path: &Path) -> io::Result<UnixListener> {
        let listener = UnixListener::bind(path)?;
        self.give(path)?;
        Ok(listener)
    }

    /// The ends of the logs, for an error to quote.
    pub(crate) fn logs(&self) -> String {
        let logs = [self.qemu_log(), self.kernel_log()].map(|path| fs::read(path).unwrap_or_default());
        let ends = logs.iter().map(|log| &log[log.len().saturating_sub(QUOTED_BYTES)..]);
        let texts: Vec<String> = ends.map(|end| String::from_utf8_lossy(end).trim().to_owned()).collect();
        texts.join("\n")
    }
}

macro_rules! paths {
    ($($(#[$doc:meta])* $name:ident $file:literal)*) => {
        impl Files {
            $($(#[$doc])* pub(crate) fn $name(&self) -> PathBuf {
                self.folder.path().join($file)
            })*
        }
    };
}
paths! {
    /// What the guest boots into.
    initramfs "initramfs"
    /// What QEMU complains about.
    qemu_log "qemu.log"
    /// What the guest's kernel says.
    kernel_log "kernel.log"
    /// Where we listen for the guest program.
    console "console"
    /// Where we listen for QEMU.
    monitor "monitor"
    /// Where QEMU listens for a manager.
    qmp "qmp"
    /// Where QEMU listens for a guest that moves in.
    incoming "incoming"
    /// libvirt's description.
    domain "domain.xml"
}
