//! What the licences of others ask to be handed on with a program: who wrote what is in it, and the texts themselves.
//!
//! Enters: the manifests of everything that ends in the program, what runs inside guests too. Leaves: one text, each licence once. What must
//! never happen: a package in the program of which no text is handed on; so one without any is an error here.
use crate::cargo::{self, Package, TARGET};
use crate::lints::INSIDE;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// How files begin, in small letters, that have a licence or what it asks to be shown.
const NAMES: [&str; 6] = ["licen", "copying", "copyright", "unlicen", "notice", "authors"];
const HEAD: &str = "\
plimsoll contains code of the packages below, each under its own licence, and of Rust's standard library (MIT OR Apache-2.0,
copyright the Rust Project Developers, https://www.rust-lang.org). The texts follow; those that are the same stand here once.
";

/// The whole text.
pub(super) fn text() -> Result<String> {
    let mut packages = BTreeSet::new();
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let program = cargo::root().join("Cargo.toml");
    let inside = INSIDE.iter().map(|(manifest, _)| (cargo::root().join(manifest), None));
    for (manifest, package) in [(program, Some("plimsoll"))].into_iter().chain(inside) {
        let wanted = in_the_program(&manifest, package)?;
        let metadata = cargo::metadata(&manifest)?;
        let of_others = metadata.packages.iter().filter(|package| wanted.contains(&named(package)));
        for package in of_others.filter(|package| !package.folder().starts_with(cargo::root())) {
            let found = texts_in(package.folder())?;
            ensure!(!found.is_empty(), "{} has no licence text in its package", named(package));
            for text in found {
                texts.entry(text).or_default().insert(named(package));
            }
            let licence = package.license.as_deref().unwrap_or("see its text");
            let source = package.repository.as_deref().unwrap_or("");
            packages.insert(format!("{:<40} {licence:<40} {source}", named(package)));
        }
    }
    ensure!(!packages.is_empty(), "cargo tree names no package of others");
    let mut whole = format!("{HEAD}\n");
    for package in packages {
        writeln!(whole, "{}", package.trim_end())?;
    }
    for (text, packages) in texts {
        let packages: Vec<_> = packages.into_iter().collect();
        write!(whole, "\n---- {}\n\n{text}", packages.join(", "))?;
    }
    Ok(whole)
}

fn named(package: &Package) -> String {
    format!("{} {}", package.name, package.version)
}

/// Names and versions of what is linked into a program. Macros only write code of their users.
fn in_the_program(manifest: &Path, package: Option<&str>) -> Result<BTreeSet<String>> {
    let mut command = cargo::cargo();
    command.args(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--no-dedupe"]);
    command.args(["--format", "{p}", "--target", TARGET, "--manifest-path"]).arg(manifest);
    command.args(package.iter().flat_map(|package| ["--package", package]));
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    let lines = String::from_utf8(output.stdout).context("cargo tree printed something unexpected")?;
    let linked = lines.lines().filter(|line| !line.contains("(proc-macro)"));
    let named = linked.filter_map(|line| {
        let (name, rest) = line.split_once(" v")?;
        Some(format!("{name} {}", rest.split(' ').next()?))
    });
    Ok(named.collect())
}

/// The texts that lie in a package's folder, without what differs and says nothing: ends of lines, and empty lines around.
fn texts_in(folder: &Path) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for path in super::tree::listed(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        if path.is_file() && NAMES.iter().any(|begin| name.starts_with(begin)) {
            let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<_> = text.lines().map(str::trim_end).collect();
            texts.push(lines.join("\n").trim_matches('\n').to_owned() + "\n");
        }
    }
    Ok(texts)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_licences_of_what_is_linked_are_handed_on_once_each_and_macros_are_not_linked() {
        let text = super::text().unwrap();
        for wanted in ["\nring 0.", "\nzstd-sys 2.", "\ntokio 1.", "BoringSSL", "For Zstandard software"] {
            assert!(text.contains(wanted), "{wanted:?} is not in {} bytes", text.len());
        }
        for none in ["\nserde_derive ", "\nproptest ", "\nplimsoll"] {
            assert!(!text.contains(none), "{none:?}");
        }
        // Without those that are the same there are more texts than packages.
        let texts = text.lines().filter(|line| line.starts_with("---- ")).count();
        let packages = text.lines().filter(|line| line.contains("https://")).count();
        assert!(texts < packages, "{texts} texts of {packages} packages");
    }
}
