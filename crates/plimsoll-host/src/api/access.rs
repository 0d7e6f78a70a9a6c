//! Who may ask, and who of them may change things.
//!
//! Enters: what the settings say, and who the kernel or a certificate says somebody is. Leaves: a [`Role`], or none. What must never
//! happen: somebody who is heard and was not named. So there is one place that decides, by what is known of the asker alone.
use super::tls::{Credentials, TlsError, names};
use crate::config::{ApiConfig, Pattern, RemoteConfig, Role};
use plimsoll_sys::fdpass::{peer_credentials, peer_groups};
use rustix::process::{getegid, getgroups};
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::sync::Arc;
use std::{fs, slice};
use thiserror::Error;

/// What the settings say about the API cannot be on this host.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AccessError {
    /// The group is not there.
    #[error(
        "[api] is for the group {name:?}, which this host has not: make it with `groupadd --system {name}`, or give its number"
    )]
    NoGroup {
        /// Its name.
        name: String,
    },
    /// The group is another's.
    #[error(
        "[api] is for the group {name:?}, in which the user that runs this daemon is not: add it, or run the daemon as root"
    )]
    NotOurs {
        /// Its name.
        name: String,
    },
    /// A certificate, or what belongs to it, is wrong.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Its port takes a right that the daemon gives up.
    #[error(
        "the API cannot listen on {address}: ports below {first} take CAP_NET_BIND_SERVICE, which a daemon gives up: use one from {first} on, \
         or have this one forwarded to such a port"
    )]
    Port {
        /// The address.
        address: SocketAddr,
        /// The first port for everybody.
        first: u16,
    },
    /// Its address is not to be had.
    #[error(
        "the API cannot listen on {address}: use an address of this host and a port that is free (under systemd, see docs/remote.md)"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Who may ask.
#[derive(Debug, Default)]
pub struct Access {
    group: Option<(u32, Role)>,
    remote: Option<Remote>,
}

/// Where others than this host's users may ask.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) listener: TcpListener,
    pub(super) tls: Arc<ServerConfig>,
    config: RemoteConfig,
}

/// Somebody who asks.
#[derive(Clone, Debug)]
pub(super) enum Caller {
    /// A user of this host.
    Local {
        /// The user.
        user: u32,
        /// The groups it was in when it connected.
        groups: Vec<u32>,
    },
    /// Somebody elsewhere with a certificate.
    Remote {
        /// The names in it.
        names: Vec<String>,
    },
}

impl Access {
    /// Whether what the settings say can be on this host. Nothing listens then, and nothing is changed.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn check(config: &ApiConfig) -> Result<(), AccessError> {
        config.group.as_ref().map_or(Ok(()), |(name, _)| group_called(name).map(drop))?;
        config.remote.as_ref().map_or(Ok(()), |remote| {
            remote.credentials().server()?;
            for_everybody(remote.listen)
        })
    }

    /// What the settings say, ready to be put in force in the place of `before`. Files are read anew; a listener whose address is the
    /// same is kept.
    ///
    /// # Errors
    /// [`AccessError`].
    pub fn prepare(config: &ApiConfig, before: &Self) -> Result<Self, AccessError> {
        let number = |(name, role): &(String, Role)| Ok::<_, AccessError>((group_called(name)?, *role));
        let group = config.group.as_ref().map(number).transpose()?;
        let remote = |config: &RemoteConfig| {
            let tls = config.credentials().server()?;
            let known = before.remote.as_ref().filter(|known| known.config.listen == config.listen);
            let listener = match known {
                Some(known) => known.listener.try_clone(),
                None => {
                    for_everybody(config.listen)?;
                    TcpListener::bind(config.listen)
                }
            };
            let listener = listener.and_then(|one| one.set_nonblocking(true).map(|()| one));
            let failed = |source| AccessError::Listen { address: config.listen, source };
            Ok::<_, AccessError>(Remote { listener: listener.map_err(failed)?, tls, config: config.clone() })
        };
        Ok(Self { group, remote: config.remote.as_ref().map(remote).transpose()? })
    }

    /// Where others than this host's users may ask, if anywhere.
    pub fn address(&self) -> Option<SocketAddr> {
        self.remote.as_ref().and_then(|remote| remote.listener.local_addr().ok())
    }

    pub(super) const fn remote(&self) -> Option<&Remote> {
        self.remote.as_ref()
    }

    /// What somebody may do.
    pub(super) fn role(&self, caller: &Caller) -> Option<Role> {
        match (caller, &self.group, &self.remote) {
            (Caller::Local { user, .. }, ..) if super::may_speak(*user) => Some(Role::Change),
            (Caller::Local { groups, .. }, Some((group, role)), _) => groups.contains(group).then_some(*role),
            (Caller::Remote { names }, _, Some(Remote { config, .. })) => {
                let is_among = |patterns: &[Pattern]| {
                    patterns.iter().any(|pattern| names.iter().any(|name| pattern.matches(name)))
                };
                let roles = [(&config.may_change, Role::Change), (&config.may_read, Role::Read)];
                roles.into_iter().find(|(patterns, _)| is_among(patterns)).map(|(_, role)| role)
            }
            _ => None,
        }
    }

    /// Lets the group, or nobody but the owner, come as far as to the socket at `path`.
    pub(super) fn open(&self, path: &Path) -> io::Result<()> {
        let Some((group, _)) = self.group else {
            return fs::set_permissions(path, fs::Permissions::from_mode(0o600));
        };
        chown(path, None, Some(group))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
        // The other sockets there are their owner's alone, as before.
        let Some(directory) = path.parent() else { return Ok(()) };
        let found = fs::metadata(directory)?;
        let (is_ours, mode) = (found.gid() == group, found.mode() & 0o7777);
        if mode & 0o001 != 0 || (is_ours && mode & 0o010 != 0) {
            return Ok(());
        }
        chown(directory, None, Some(group))?;
        fs::set_permissions(directory, fs::Permissions::from_mode((mode & !0o070) | 0o010))
    }
}

impl RemoteConfig {
    fn credentials(&self) -> Credentials {
        let Self { certificate, key, client_ca, .. } = self.clone();
        Credentials { certificate, key, authority: client_ca }
    }
}

impl Caller {
    /// Whoever connected to a Unix socket, by the kernel's word.
    pub(super) fn local(socket: impl AsFd) -> io::Result<Self> {
        let peer = peer_credentials(&socket)?;
        let mut groups = peer_groups(&socket)?;
        groups.push(peer.gid);
        Ok(Self::Local { user: peer.uid, groups })
    }

    /// Whoever has shown these certificates, its own first, which were checked.
    pub(super) fn remote(shown: Option<&[CertificateDer<'_>]>) -> Self {
        Self::Remote { names: shown.and_then(<[_]>::first).map(names).unwrap_or_default() }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local { user, .. } => write!(f, "user {user}"),
            Self::Remote { names } if names.is_empty() => {
                f.write_str("a client whose certificate has no subject alternative name")
            }
            Self::Remote { names } => write!(f, "a client whose certificate is for {}", names.join(", ")),
        }
    }
}

/// Whether an address needs no right to be listened on. Whoever asks may have that right still, and the manager has not.
fn for_everybody(address: SocketAddr) -> Result<(), AccessError> {
    let said = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let first = said.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(1024);
    // Port 0 is any that is free, of the others.
    if (1..first).contains(&address.port()) { Err(AccessError::Port { address, first }) } else { Ok(()) }
}

/// The number of a group of this host's own: directories that others keep are not asked, which may take any time.
fn group_called(name: &str) -> Result<u32, AccessError> {
    let text = fs::read_to_string("/etc/group").unwrap_or_default();
    let mut lines = text.lines().map(|line| line.split(':'));
    let found = lines.find_map(|mut fields| (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?);
    let found = found.or_else(|| name.parse().ok());
    let group = found.ok_or_else(|| AccessError::NoGroup { name: name.to_owned() })?;
    let own = getgroups().unwrap_or_default();
    let is_ours = own.iter().chain(slice::from_ref(&getegid())).any(|own| own.as_raw() == group);
    if rustix::process::geteuid().is_root() || is_ours {
        return Ok(group);
    }
    Err(AccessError::NotOurs { name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRANGER: u32 = 4_000_000;

    fn local(user: u32, groups: &[u32]) -> Caller {
        Caller::Local { user, groups: groups.to_owned() }
    }

    #[test]
    fn a_group_has_what_it_was_given_and_nobody_else_has_anything() {
        for role in [Role::Read, Role::Change] {
            let access = Access { group: Some((77, role)), remote: None };
            assert_eq!(access.role(&local(0, &[])), Some(Role::Change));
            assert_eq!(access.role(&local(STRANGER, &[5, 77])), Some(role));
            assert_eq!(access.role(&local(STRANGER, &[5])), None);
            assert_eq!(access.role(&Caller::Remote { names: vec!["x".to_owned()] }), None);
        }
        assert_eq!(Access::default().role(&local(STRANGER, &[0, 77])), None);
    }

    #[test]
    fn groups_are_found_by_name_and_number_and_one_that_is_not_there_is_told() {
        assert_eq!(group_called("root").ok(), Some(0));
        assert!(matches!(group_called("no such group"), Err(AccessError::NoGroup { .. })));
        if rustix::process::geteuid().is_root() {
            assert_eq!(group_called("4711").ok(), Some(4711));
        }
    }
}
