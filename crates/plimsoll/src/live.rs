//! What the verbs that speak to a running daemon have in common: where it is, and how its answers are said.
use crate::trace::say;
use plimsoll_host::api::client::{Client, ClientError};
use plimsoll_host::api::{Credentials, Machine, Machines};
use plimsoll_linux::explain;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::env;
use std::fmt::Display;
use std::path::PathBuf;

/// Where a daemon is, and is looked for, unless it is said otherwise.
pub(crate) const DIRECTORY: &str = "/run/plimsoll";

/// Where a daemon's certificates are looked for unless they are named, in the folder of the user's own settings.
const FOLDER: &str = "plimsoll";

/// Which daemon is asked.
#[derive(clap::Args)]
pub(crate) struct DaemonAt {
    /// The daemon's directory.
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, env = "PLIMSOLL_DIRECTORY")]
    directory: PathBuf,
    /// A daemon elsewhere, which listens there.
    #[arg(long, value_name = "https://NAME:PORT", env = "PLIMSOLL_HOST")]
    host: Option<String>,
    /// For a daemon elsewhere: who signs its certificate. Default: ca.pem in PLIMSOLL_CERTS, or else in ~/.config/plimsoll.
    #[arg(long, value_name = "FILE")]
    cacert: Option<PathBuf>,
    /// The certificate that is shown to it. Default: cert.pem there.
    #[arg(long, value_name = "FILE")]
    cert: Option<PathBuf>,
    /// That certificate's key. Default: key.pem there.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

impl DaemonAt {
    pub(crate) fn client(&self) -> Result<Client, ClientError> {
        let Some(host) = &self.host else { return Ok(Client::of(&self.directory)) };
        let folder = folder();
        let file = |named: &Option<PathBuf>, usual| named.clone().unwrap_or_else(|| folder.join(usual));
        let credentials = Credentials {
            certificate: file(&self.cert, "cert.pem"),
            key: file(&self.key, "key.pem"),
            authority: file(&self.cacert, "ca.pem"),
        };
        Client::elsewhere(host, credentials)
    }
}

/// Where this user's certificates are.
fn folder() -> PathBuf {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let settings = || set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
    set("PLIMSOLL_CERTS").unwrap_or_else(|| settings().unwrap_or_default().join(FOLDER))
}

/// Which daemon is asked, and how its answer is said.
#[derive(clap::Args)]
pub(crate) struct LiveArgs {
    #[command(flatten)]
    daemon: DaemonAt,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

impl LiveArgs {
    pub(crate) fn client(&self) -> Result<Client, ClientError> {
        self.daemon.client()
    }

    /// Whether the daemon is on this host.
    pub(crate) const fn is_here(&self) -> bool {
        self.daemon.host.is_none()
    }

    pub(crate) const fn is_json(&self) -> bool {
        self.json
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, String> {
        self.client().and_then(|client| client.get(path)).map_err(|error| explain(&error))
    }

    pub(crate) fn send<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, String> {
        self.client().and_then(|client| client.send(method, path, body)).map_err(|error| explain(&error))
    }

    /// Says it.
    pub(crate) fn show(&self, value: &(impl Serialize + Display)) -> Result<(), String> {
        say(self.json, value)
    }
}

/// All machines, or those of a group, page by page. The usual number of machines of one answer is 100; those of a whole host need a tenth
/// of the requests so.
pub(crate) fn machines(client: &Client, group: Option<&str>) -> Result<Vec<Machine>, ClientError> {
    let group = group.map(|group| format!("&group={}", escaped(group))).unwrap_or_default();
    let (mut machines, mut after) = (Vec::new(), String::new());
    loop {
        let page: Machines = client.get(&format!("/v1/machines?limit=1000{group}{after}"))?;
        machines.extend(page.machines);
        let Some(next) = page.next else { return Ok(machines) };
        after = format!("&after={next}");
    }
}

/// A name as a part of a path: what is not plain is escaped.
pub(crate) fn escaped(name: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes().fold(String::new(), |mut path, byte| {
        match is_plain(byte) {
            true => path.push(char::from(byte)),
            false => path.push_str(&format!("%{byte:02X}")),
        }
        path
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_one_part_of_the_path() {
        assert_eq!(escaped("web-1.test"), "web-1.test");
        assert_eq!(escaped("a/b?c#d e%ü"), "a%2Fb%3Fc%23d%20e%25%C3%BC");
    }
}
