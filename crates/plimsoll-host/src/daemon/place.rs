//! The daemon's directory: one daemon at a time, and its two sockets.
//!
//! Enters: a path. Leaves: a lock and two listening sockets. What must never happen: a socket of a daemon that lives taken
//! from it. The lock says whether one does; it belongs to the open file, and so lives as long as the last process that has it,
//! be it keeper or manager. A socket in a directory that nobody has locked is stale, and removed. What is written there is found
//! there: nobody else may write to it.
use super::accepted::ACCEPTED;
use crate::api::may_speak;
use crate::helm::kept::SAID;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, mkdirat, open, stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Connections that wait while there is no manager.
const BACKLOG: i32 = 64;
/// On which machines are handed over.
pub const HANDOVER: &str = "handover.sock";
/// On which an operator asks.
pub const CONTROL: &str = "control.sock";
/// On which the API is served. The manager makes it anew: nobody waits there while there is none.
pub const API: &str = crate::api::SOCKET;
const LOCK: &str = "lock";

/// The directory cannot be had.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// Another daemon has it.
    #[error("another plimsoll daemon runs on {directory:?}: stop it, or give this one another --directory")]
    Taken {
        /// The directory.
        directory: PathBuf,
    },
    /// Others could put something of theirs in the place of what the daemon has there.
    #[error(
        "user {owner} has {directory:?}, whose mode is {mode:04o}: use a --directory of your own to which nobody else may write"
    )]
    Open {
        /// The directory.
        directory: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who may do what.
        mode: u32,
    },
    /// The path of a socket would be too long for the kernel.
    #[error("the path {path:?} is too long for a socket: use a --directory of fewer than 90 bytes")]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Something else failed.
    #[error("cannot {action} {path:?}")]
    Other {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// What a daemon has of its directory.
#[derive(Debug)]
pub struct Place {
    /// Held as long as it is open anywhere.
    pub lock: OwnedFd,
    /// Listens for machines.
    pub handover: OwnedFd,
    /// Listens for an operator.
    pub control: OwnedFd,
}

/// Makes the directory if there is none, and claims it.
///
/// # Errors
/// [`PlaceError`].
pub fn claim(directory: &Path) -> Result<Place, PlaceError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |errno: Errno| PlaceError::Other { action, path, source: errno.into() }
    };
    match mkdirat(rustix::fs::CWD, directory, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(failed("make the directory", directory)(errno)),
    }
    let stat = stat(directory).map_err(failed("look at the directory", directory))?;
    let mode = stat.st_mode & 0o7777;
    if !may_speak(stat.st_uid) || mode & 0o022 != 0 {
        return Err(PlaceError::Open { directory: directory.to_owned(), owner: stat.st_uid, mode });
    }
    let path = directory.join(LOCK);
    let lock = open(&path, OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
        .map_err(failed("open", &path))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(PlaceError::Taken { directory: directory.to_owned() }),
        Err(errno) => return Err(failed("lock", &path)(errno)),
    }
    let listening = |name| {
        let path = directory.join(name);
        // Nobody has the lock, so nobody listens there any more.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(PlaceError::Other { action: "remove the stale", path, source: error });
            }
            _ => {}
        }
        let address = SocketAddrUnix::new(&path).map_err(|_| PlaceError::TooLong { path: path.clone() })?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(failed("make a socket for", &path))?;
        bind(&socket, &address).map_err(failed("bind", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
            .map_err(|source| PlaceError::Other { action: "restrict", path: path.clone(), source })?;
        listen(&socket, BACKLOG).map_err(failed("listen on", &path))?;
        Ok(socket)
    };
    // What was said by an API, and what settings were accepted, lasts as long as its daemon.
    for name in [SAID, ACCEPTED] {
        let _ = fs::remove_file(directory.join(name));
    }
    Ok(Place { handover: listening(HANDOVER)?, control: listening(CONTROL)?, lock })
}

/// Removes the files of a daemon that ends. That of the lock stays: removing it would let two have it.
pub fn give_up(directory: &Path) {
    for name in [HANDOVER, CONTROL, API, SAID, ACCEPTED] {
        // Best effort: the next daemon removes what is stale.
        let _ = fs::remove_file(directory.join(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_a_stale_socket_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("run");
        let place = claim(&directory).unwrap();
        let second = claim(&directory);
        assert!(matches!(second, Err(PlaceError::Taken { .. })), "{second:?}");
        let copy = place.lock.try_clone().unwrap();
        drop(place);
        assert!(matches!(claim(&directory), Err(PlaceError::Taken { .. })), "its manager lives");
        drop(copy);
        assert!(directory.join(HANDOVER).exists(), "what a killed daemon leaves");
        drop(claim(&directory).unwrap());
        give_up(&directory);
        assert!(!directory.join(HANDOVER).exists() && !directory.join(CONTROL).exists());
    }

    #[test]
    fn a_directory_to_which_others_may_write_is_refused_and_left_as_it_was() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("run");
        fs::create_dir(&directory).unwrap();
        for mode in [0o777, 0o1777, 0o770, 0o702] {
            fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
            let text = claim(&directory).unwrap_err().to_string();
            assert!(text.contains(&format!("whose mode is {mode:04o}")), "{text}");
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        if rustix::process::geteuid().is_root() {
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
            std::os::unix::fs::chown(&directory, Some(65534), None).unwrap();
            let text = claim(&directory).unwrap_err().to_string();
            assert!(text.contains("user 65534 has"), "{text}");
            std::os::unix::fs::chown(&directory, Some(0), None).unwrap();
        }
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
        drop(claim(&directory).unwrap());
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused_by_name() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("x".repeat(100));
        assert!(matches!(claim(&directory), Err(PlaceError::TooLong { .. })));
        let file = parent.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(claim(&file), Err(PlaceError::Other { .. })));
    }
}
