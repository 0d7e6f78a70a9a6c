//! Settings of an operator, and what clients say and are told: read and written again it is the same, and a mistake has a place.
use super::text;
use plimsoll_host::api::{Attach, Budget, Fault, Reclaim, Settings};
use plimsoll_host::config::{Config, ConfigError};
use plimsoll_host::daemon::status;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

/// Reads bytes as a settings file.
pub(crate) fn file(bytes: &[u8]) -> bool {
    let text = text(bytes);
    match Config::parse(&text, "host.toml") {
        Ok(config) => {
            let again = Config::parse(&text, "host.toml").map_err(|mistakes| mistakes.to_string());
            assert_eq!(again.map(|again| format!("{again:?}")), Ok(format!("{config:?}")));
            // Whatever is accepted can be asked for.
            config.machines.keys().for_each(|name| drop(config.machine(name)));
            true
        }
        Err(mistakes) => {
            assert!(mistakes.each().count() > 0, "refused for no reason");
            for mistake in mistakes.each() {
                assert!(matches!(mistake, ConfigError::Wrong { .. }), "nothing was read: {mistake}");
                let said = mistake.to_string();
                assert!(said.starts_with("host.toml:") && !said.contains('\n'), "{said:?}");
            }
            false
        }
    }
}

pub(crate) fn files() -> Vec<Vec<u8>> {
    let plain = "[host]\nmemory = \"24G\"\nidle-tax = \"75%\"\n[group.tenant]\nreservation = \"4G\"\nlimit = \"12G\"\n\
                 shares = 5000\nsharing = true\n[machine.web]\ngroup = \"tenant\"\nreservation = \"1G\"\nlimit = \"4G\"\n\
                 highest = \"compress\"\n[machine.db]\nstartup = \"2G\"\nminimum = \"1G\"\nmaximum = \"8G\"\nbuffer = \"20%\"\n";
    let rule = "[[rule]]\nvmm = \"qemu\"\nname = \"web-*\"\nuser = \"libvirt-qemu\"\nshares = 2000\n";
    vec![plain.into(), rule.into()]
}

/// Reads bytes as each body, and as each request on the control socket.
pub(crate) fn request(bytes: &[u8]) -> bool {
    let is_said = [
        again::<Settings>(bytes),
        again::<Attach>(bytes),
        again::<Reclaim>(bytes),
        again::<Budget>(bytes),
        again::<Fault>(bytes),
    ];
    is_said.contains(&true) || serde_json::from_slice::<status::Request>(bytes).is_ok()
}

/// Whether it is one; written, it is read as the same.
fn again<T: DeserializeOwned + Serialize + PartialEq + Debug>(bytes: &[u8]) -> bool {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else { return false };
    let written = serde_json::to_vec(&value).unwrap();
    assert_eq!(serde_json::from_slice::<T>(&written).unwrap(), value);
    true
}

pub(crate) fn requests() -> Vec<Vec<u8>> {
    [
        r#"{"do":"status"}"#,
        r#"{"do":"squeeze","machine":3,"pages":1000}"#,
        r#"{"do":"park","machine":3}"#,
        r#"{"reservation_bytes":1073741824,"limit_bytes":4294967296,"shares":5000,"highest":"compress"}"#,
        r#"{"kind":"dynamic","minimum_bytes":0,"maximum_bytes":4096,"buffer_ppm":200000,"weight":5000}"#,
        r#"{"machine":"web","qmp":"/run/web.qmp","settings":{"group":"tenant","stall_objective_ppm":1000}}"#,
        r#"{"bytes":1073741824}"#,
    ]
    .map(Vec::from)
    .into()
}
