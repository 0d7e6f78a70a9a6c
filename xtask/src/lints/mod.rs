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

/// The guest image's manifest: a workspace of its own, with its own lock file.
pub(crate) fn image_manifest() -> std::path::PathBuf {
    cargo::root().join("crates/plimsoll-guest/image/Cargo.toml")
}

/// Applies all rules.
pub(crate) fn check() -> Result<Vec<Violation>> {
    let workspace: Metadata = cargo::metadata(&cargo::root().join("Cargo.toml"))?;
    let image = cargo::metadata(&image_manifest())?;
    let mut violations = sources::check(cargo::root())?;
    violations.extend(rooms::check(&workspace)?);
    for metadata in [&workspace, &image] {
        violations.extend(licences::check(metadata));
    }
    Ok(violations)
}

/// A path as messages show it.
fn shown(path: &Path) -> String {
    path.strip_prefix(cargo::root()).unwrap_or(path).display().to_string()
}
