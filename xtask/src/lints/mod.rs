//! House rules that neither rustc nor clippy knows.
//!
//! Enters: the workspace's sources and what cargo says about its packages. Leaves: violations, each with the place and what
//! to do. A rule reads text or metadata and changes nothing.
//!
//! * [`sources`]: what source files contain, and how long they are. [`rooms`]: what each package may be and depend on.
//! * [`licences`]: under which terms dependencies come.
mod licences;
mod rooms;
mod sources;

use crate::cargo::{self, Metadata};
use anyhow::Result;
use std::fmt;
use std::path::Path;

/// Something a rule forbids.
pub(crate) struct Violation {
    /// The rule.
    rule: &'static str,
    /// The file or package.
    place: String,
    /// What was found and what to do.
    found: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.place, self.rule, self.found)
    }
}

/// What runs inside guests: workspaces of their own, each with its lock file and the flags it is really built with.
pub(crate) const INSIDE: [(&str, &str); 4] = [
    ("crates/plimsoll-guest/image/Cargo.toml", "-Crelocation-model=static"),
    ("crates/plimsoll-metal/image/Cargo.toml", "-Crelocation-model=static"),
    ("crates/plimsoll-metal/caller/Cargo.toml", "-Crelocation-model=static"),
    ("crates/plimsoll-stock/init/Cargo.toml", "-Ctarget-feature=+crt-static"),
];

/// Applies all rules.
pub(crate) fn check() -> Result<Vec<Violation>> {
    let workspace: Metadata = cargo::metadata(&cargo::root().join("Cargo.toml"))?;
    let mut violations = sources::check(cargo::root())?;
    violations.extend(rooms::check(&workspace)?);
    violations.extend(licences::check(&workspace));
    for (manifest, _) in INSIDE {
        violations.extend(licences::check(&cargo::metadata(&cargo::root().join(manifest))?));
    }
    Ok(violations)
}

/// A path as messages show it.
fn shown(path: &Path) -> String {
    path.strip_prefix(cargo::root()).unwrap_or(path).display().to_string()
}
