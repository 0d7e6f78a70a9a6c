//! Certificates: files enter, what either end of a connection is set up with leaves, or a sentence that says which file is wrong in what.
//!
//! Both ends show a certificate and check the other's, with TLS 1.3 and nothing older, and each connection by itself: none is taken up
//! again from an earlier one's word. What must never happen: a key used that others may read, or a certificate served that no client
//! can accept.
use crate::config::texts::{opened, text_in};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, ServerConfig};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use thiserror::Error;
use x509_cert::Certificate;
use x509_cert::der::{DateTime, Decode};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// What is spoken inside.
const PROTOCOL: &[u8] = b"http/1.1";

/// The files of one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Its own certificate, first, and those by which that is signed.
    pub certificate: PathBuf,
    /// The key of its own.
    pub key: PathBuf,
    /// Those by which the other end's is to be signed.
    pub authority: PathBuf,
}

/// What a file is to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// An end's own certificate.
    Certificate,
    /// Its key.
    Key,
    /// Those that sign the other end's.
    Authority,
}

impl std::fmt::Display for Holds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Certificate => "certificate",
            Self::Key => "key",
            Self::Authority => "certificate authority",
        })
    }
}

/// Files with which no connection can be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TlsError {
    /// One of them cannot be read.
    #[error("the {what} {path:?} cannot be read")]
    Read {
        /// What it was to hold.
        what: Holds,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// One holds something else.
    #[error("{path:?} holds no {what}: it is to be PEM, with lines that begin with -----BEGIN")]
    Empty {
        /// What it was to hold.
        what: Holds,
        /// Its path.
        path: PathBuf,
    },
    /// A key that is none any more.
    #[error(
        "the key {path:?} is user {owner}'s with mode {mode:04o}: it is to be yours or root's, and others may not read it: chmod 0600"
    )]
    Exposed {
        /// Its path.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who may do what.
        mode: u32,
    },
    /// A certificate is none.
    #[error("the {what} {path:?} makes no sense: {why}")]
    Damaged {
        /// What it was to hold.
        what: Holds,
        /// Its path.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// A certificate's time is over.
    #[error("the certificate {path:?} has expired on {end}: have it renewed")]
    Expired {
        /// Its path.
        path: PathBuf,
        /// When.
        end: DateTime,
    },
    /// A certificate's time has not come.
    #[error("the certificate {path:?} is not valid before {begin}: use another, or set this host's clock")]
    Early {
        /// Its path.
        path: PathBuf,
        /// When it has.
        begin: DateTime,
    },
    /// A certificate that nobody can check.
    #[error(
        "the certificate {path:?} has no subject alternative name: have one made that names its host or client"
    )]
    Nameless {
        /// Its path.
        path: PathBuf,
    },
    /// Two files that do not belong together.
    #[error(
        "the key {key:?} is not that of the certificate {certificate:?}: name the two that belong together"
    )]
    Mismatch {
        /// The certificate's path.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
    },
    /// Something else is wrong with them.
    #[error("the certificate {path:?} cannot be used")]
    Unusable {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::Error,
    },
}

/// What was read of [`Credentials`].
struct Read {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    authority: Arc<RootCertStore>,
}

impl Credentials {
    /// What a daemon meets its clients with.
    ///
    /// # Errors
    /// [`TlsError`].
    pub(super) fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let Read { chain, key, authority } = self.read()?;
        let clients = WebPkiClientVerifier::builder_with_provider(authority, provider()).build();
        let clients = clients.map_err(|error| self.damaged(Holds::Authority, &error))?;
        let config = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let config =
            config.and_then(|config| config.with_client_cert_verifier(clients).with_single_cert(chain, key));
        let mut config = config.map_err(|error| self.unusable(error))?;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }

    /// What a client meets a daemon with.
    ///
    /// # Errors
    /// [`TlsError`].
    pub(super) fn client(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let Read { chain, key, authority } = self.read()?;
        let config = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
        let config = config
            .and_then(|config| config.with_root_certificates(authority).with_client_auth_cert(chain, key));
        let mut config = config.map_err(|error| self.unusable(error))?;
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Arc::new(config))
    }

    fn read(&self) -> Result<Read, TlsError> {
        let chain = certificates(Holds::Certificate, &self.certificate)?;
        self.own(&chain)?;
        let text = text(Holds::Key, &self.key, |found| self.is_closed(found))?;
        let empty = |_| TlsError::Empty { what: Holds::Key, path: self.key.clone() };
        let key = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(empty)?;
        let mut authority = RootCertStore::empty();
        for one in certificates(Holds::Authority, &self.authority)? {
            authority.add(one).map_err(|error| self.damaged(Holds::Authority, &error))?;
        }
        Ok(Read { chain, key, authority: Arc::new(authority) })
    }

    /// Whether the end's own certificate, the first of a chain, counts today, for somebody.
    fn own(&self, chain: &[CertificateDer<'_>]) -> Result<(), TlsError> {
        let path = || self.certificate.clone();
        let Some(first) = chain.first() else {
            return Err(TlsError::Empty { what: Holds::Certificate, path: path() });
        };
        let own = Certificate::from_der(first).map_err(|error| self.damaged(Holds::Certificate, &error))?;
        let (begin, end) = (own.tbs_certificate.validity.not_before, own.tbs_certificate.validity.not_after);
        let now = SystemTime::now();
        if now > end.to_system_time() {
            return Err(TlsError::Expired { path: path(), end: end.to_date_time() });
        }
        if now < begin.to_system_time() {
            return Err(TlsError::Early { path: path(), begin: begin.to_date_time() });
        }
        let names = own.tbs_certificate.get::<SubjectAltName>();
        match names.map_err(|error| self.damaged(Holds::Certificate, &error))? {
            Some((_, SubjectAltName(names))) if !names.is_empty() => Ok(()),
            _ => Err(TlsError::Nameless { path: path() }),
        }
    }

    /// Whether the key is a secret: nobody may read it but its owner and, where that is root, a group that root gave it to.
    fn is_closed(&self, found: &Metadata) -> Result<(), TlsError> {
        let (owner, mode) = (found.uid(), found.mode() & 0o7777);
        let allowed = if owner == 0 { 0o740 } else { 0o700 };
        if super::may_speak(owner) && mode & !allowed == 0 {
            return Ok(());
        }
        Err(TlsError::Exposed { path: self.key.clone(), owner, mode })
    }

    fn damaged(&self, what: Holds, why: &dyn std::error::Error) -> TlsError {
        let path = if what == Holds::Authority { &self.authority } else { &self.certificate };
        TlsError::Damaged { what, path: path.clone(), why: plimsoll_linux::explain(why) }
    }

    fn unusable(&self, source: rustls::Error) -> TlsError {
        let Self { certificate, key, .. } = self.clone();
        match source {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
                TlsError::Mismatch { certificate, key }
            }
            source => TlsError::Unusable { path: certificate, source },
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn text(
    what: Holds,
    path: &Path,
    check: impl FnOnce(&Metadata) -> Result<(), TlsError>,
) -> Result<String, TlsError> {
    let failed = |source| TlsError::Read { what, path: path.to_owned(), source };
    // What is looked at is what is read.
    let (file, found) = opened(path).map_err(failed)?;
    check(&found)?;
    text_in(file).map_err(failed)
}

fn certificates(what: Holds, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = text(what, path, |_| Ok(()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    found
        .ok()
        .filter(|found| !found.is_empty())
        .ok_or_else(|| TlsError::Empty { what, path: path.to_owned() })
}

/// The names that a certificate gives whoever shows it: of hosts, in lower case, of services (URIs), and of people (mail addresses).
/// Whoever calls has checked who signed it.
pub(super) fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let known = Certificate::from_der(certificate).ok();
    let names = known.and_then(|known| known.tbs_certificate.get::<SubjectAltName>().ok().flatten());
    let Some((_, SubjectAltName(names))) = names else { return Vec::new() };
    let name = |name: &GeneralName| match name {
        GeneralName::DnsName(name) => Some(name.as_str().to_ascii_lowercase()),
        GeneralName::UniformResourceIdentifier(name) | GeneralName::Rfc822Name(name) => {
            Some(name.as_str().to_owned())
        }
        _ => None,
    };
    names.iter().filter_map(name).collect()
}
