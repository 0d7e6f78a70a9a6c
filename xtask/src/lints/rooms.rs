//! Rules about packages.
//!
//! * `downward-only`: a room depends on lower rooms only, and only on those it is meant to know.
//! * `below-the-line`: a room below the line has neither std nor unsafe code.
//! * `house-lints`: a package takes part in the workspace's lints.
//! * `published`: what a registry shows about a package is there.
use super::{Violation, shown};
use crate::cargo::{Metadata, Package};
use crate::no_std;
use anyhow::{Context, Result};
use std::fs;

/// Each room and the rooms it may know, lowest first. A new room, or a new arrow, is a decision about the architecture.
const ARROWS: [(&str, &[&str]); 21] = [
    ("plimsoll-types", &[]),
    ("plimsoll-inside", &[]),
    ("plimsoll-mmu", &["plimsoll-types"]),
    ("plimsoll-guest", &["plimsoll-types"]),
    ("plimsoll-store", &["plimsoll-types"]),
    ("plimsoll-core", &["plimsoll-types"]),
    ("plimsoll-policy", &["plimsoll-types"]),
    ("plimsoll-sim", &["plimsoll-types", "plimsoll-core", "plimsoll-policy"]),
    ("plimsoll-sys", &["plimsoll-types"]),
    ("plimsoll-inspect", &["plimsoll-types", "plimsoll-mmu", "plimsoll-sys"]),
    // For tests alone.
    ("plimsoll-oracle", &["plimsoll-mmu", "plimsoll-sys"]),
    ("plimsoll-linux", &["plimsoll-types", "plimsoll-store", "plimsoll-core", "plimsoll-sys"]),
    // For its tests alone plimsoll-mmu and plimsoll-oracle, what KVM makes of a guest's tables, and plimsoll-store, where slabs lie.
    (
        "plimsoll-vmm",
        &[
            "plimsoll-types",
            "plimsoll-inside",
            "plimsoll-mmu",
            "plimsoll-guest",
            "plimsoll-core",
            "plimsoll-store",
            "plimsoll-sys",
            "plimsoll-oracle",
            "plimsoll-linux",
        ],
    ),
    ("plimsoll-attach", &["plimsoll-types", "plimsoll-core", "plimsoll-sys", "plimsoll-linux"]),
    // plimsoll-linux for its tests alone: they need swap.
    (
        "plimsoll-stock",
        &["plimsoll-types", "plimsoll-inside", "plimsoll-guest", "plimsoll-sys", "plimsoll-linux"],
    ),
    // The image, a package of its own, knows the rooms below the line: types, guest, mmu, core, store and policy.
    (
        "plimsoll-metal",
        &[
            "plimsoll-types",
            "plimsoll-inside",
            "plimsoll-guest",
            "plimsoll-core",
            "plimsoll-policy",
            "plimsoll-sim",
            "plimsoll-sys",
        ],
    ),
    (
        "plimsoll-host",
        &[
            "plimsoll-types",
            "plimsoll-core",
            "plimsoll-store",
            "plimsoll-policy",
            "plimsoll-sys",
            "plimsoll-linux",
            "plimsoll-attach",
        ],
    ),
    (
        "plimsoll",
        &[
            "plimsoll-types",
            "plimsoll-mmu",
            "plimsoll-guest",
            "plimsoll-store",
            "plimsoll-core",
            "plimsoll-sys",
            "plimsoll-inspect",
            "plimsoll-linux",
            "plimsoll-vmm",
            "plimsoll-attach",
            "plimsoll-host",
            "plimsoll-policy",
            "plimsoll-sim",
            "plimsoll-stock",
            "plimsoll-metal",
        ],
    ),
    (
        "plimsoll-bench",
        &[
            "plimsoll-types",
            "plimsoll-guest",
            "plimsoll-store",
            "plimsoll-core",
            "plimsoll-host",
            "plimsoll-policy",
            "plimsoll-sys",
            "plimsoll-linux",
            "plimsoll-vmm",
            "plimsoll-attach",
            "plimsoll-stock",
        ],
    ),
    // For tests and fuzzers alone: every room that parses.
    (
        "plimsoll-fuzz",
        &[
            "plimsoll-types",
            "plimsoll-mmu",
            "plimsoll-guest",
            "plimsoll-store",
            "plimsoll-core",
            "plimsoll-policy",
            "plimsoll-sys",
            "plimsoll-inspect",
            "plimsoll-linux",
            "plimsoll-attach",
            "plimsoll-host",
        ],
    ),
    ("xtask", &[]),
];

/// Looks at every member of the workspace.
pub(super) fn check(metadata: &Metadata) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for package in metadata.members() {
        let mut report = |rule, found| {
            violations.push(Violation { rule, place: shown(&package.manifest_path), found });
        };
        wrong_arrows(package).into_iter().for_each(|found| report("downward-only", found));
        missing_lints(package)?.into_iter().for_each(|found| report("house-lints", found));
        below_the_line(package)?.into_iter().for_each(|found| report("below-the-line", found));
        missing_metadata(package).into_iter().for_each(|found| report("published", found));
    }
    Ok(violations)
}

fn wrong_arrows(package: &Package) -> Vec<String> {
    let own = ARROWS.iter().find(|(room, _)| *room == package.name);
    let Some((_, allowed)) = own else {
        return vec![format!("{} is no known room: add it to ARROWS in {}", package.name, file!())];
    };
    let is_room = |name: &str| name.starts_with("plimsoll");
    let wrong =
        package.dependencies.iter().filter(|other| is_room(&other.name) && !allowed.contains(&&*other.name));
    wrong.map(|other| format!("{} must not depend on {}", package.name, other.name)).collect()
}

fn missing_lints(package: &Package) -> Result<Option<String>> {
    let path = &package.manifest_path;
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let is_there = text.contains("[lints]\nworkspace = true");
    Ok((!is_there).then(|| "`[lints]` with `workspace = true` is missing".to_owned()))
}

fn below_the_line(package: &Package) -> Result<Vec<String>> {
    if !no_std::ROOMS.contains(&&*package.name) {
        return Ok(Vec::new());
    }
    let path = package.folder().join("src/lib.rs");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let needed = ["#![no_std]", concat!("#![forbid(unsafe", "_code)]")];
    let missing = needed.into_iter().filter(|attribute| !text.lines().any(|line| line == *attribute));
    Ok(missing.map(|attribute| format!("src/lib.rs has no `{attribute}`")).collect())
}

fn missing_metadata(package: &Package) -> Option<String> {
    if package.publish.as_ref().is_some_and(Vec::is_empty) {
        return None;
    }
    let fields = [
        ("description", package.description.is_some()),
        ("license", package.license.is_some()),
        ("repository", package.repository.is_some()),
        ("keywords", !package.keywords.is_empty()),
        ("categories", !package.categories.is_empty()),
    ];
    let missing: Vec<&str> = fields.into_iter().filter(|(_, there)| !there).map(|(field, _)| field).collect();
    (!missing.is_empty()).then(|| format!("has no {}", missing.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrows_point_downward_only() {
        for (place, (room, allowed)) in ARROWS.iter().enumerate() {
            let lower: Vec<&str> = ARROWS[..place].iter().map(|(lower, _)| *lower).collect();
            assert!(allowed.iter().all(|other| lower.contains(other)), "{room} knows a higher room");
        }
    }
}
