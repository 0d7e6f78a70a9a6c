//! Certificates made for a test, as files.
use plimsoll_host::api::Credentials;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType, date_time_ymd};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Somebody who signs.
pub(crate) struct Authority {
    folder: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// When a certificate counts.
#[derive(Clone, Copy)]
pub(crate) enum Valid {
    Now,
    Before,
    Later,
}

impl Authority {
    /// Whose certificate is `NAME.ca` in a folder.
    pub(crate) fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(folder.join(format!("{name}.ca")), issuer.pem()).unwrap();
        Self { folder: folder.to_owned(), issuer }
    }

    /// Makes `FILE.pem` and `FILE.key`, for these names; `authority` is whom its owner believes.
    pub(crate) fn sign(&self, file: &str, names: &[&str], valid: Valid, authority: &str) -> Credentials {
        let name = |name: &&str| match name {
            name if name.contains("://") => SanType::URI((*name).try_into().unwrap()),
            name => name
                .parse()
                .map_or_else(|_| SanType::DnsName((**name).try_into().unwrap()), SanType::IpAddress),
        };
        let mut params = CertificateParams::new([]).unwrap();
        params.subject_alt_names = names.iter().map(name).collect();
        (params.not_before, params.not_after) = match valid {
            Valid::Now => (date_time_ymd(2020, 1, 1), date_time_ymd(2120, 1, 1)),
            Valid::Before => (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1)),
            Valid::Later => (date_time_ymd(2119, 1, 1), date_time_ymd(2120, 1, 1)),
        };
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |kind: &str| self.folder.join(format!("{file}.{kind}"));
        fs::write(path("pem"), certificate.pem()).unwrap();
        fs::write(path("key"), key.serialize_pem()).unwrap();
        fs::set_permissions(path("key"), fs::Permissions::from_mode(0o600)).unwrap();
        Credentials {
            certificate: path("pem"),
            key: path("key"),
            authority: self.folder.join(format!("{authority}.ca")),
        }
    }
}
