//! The files that are shipped, and what dpkg is told about them.
//!
//! Enters: the program, `contrib`, `docs`. Leaves: a folder that looks like `/` on the machine they are installed on. What must never
//! happen: a file of which the table does not say where it goes.
use super::{notices, time_of};
use crate::cargo::{self, Package};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where a file of the workspace goes.
const FILES: [(&str, &str); 11] = [
    ("contrib/plimsoll.service", "usr/lib/systemd/system/plimsoll.service"),
    ("contrib/etc/daemon.env", "etc/plimsoll/daemon.env"),
    ("contrib/etc/plimsoll.toml", "etc/plimsoll/plimsoll.toml"),
    ("contrib/grafana/plimsoll.json", "usr/share/doc/plimsoll/examples/grafana/plimsoll.json"),
    (
        "contrib/prometheus/plimsoll.rules.yml",
        "usr/share/doc/plimsoll/examples/prometheus/plimsoll.rules.yml",
    ),
    ("docs/openapi.json", "usr/share/doc/plimsoll/openapi.json"),
    ("README.md", "usr/share/doc/plimsoll/README.md"),
    ("SECURITY.md", "usr/share/doc/plimsoll/SECURITY.md"),
    ("CHANGELOG.md", "usr/share/doc/plimsoll/changelog"),
    ("LICENSE-APACHE", "usr/share/doc/plimsoll/LICENSE-APACHE"),
    ("LICENSE-MIT", "usr/share/doc/plimsoll/LICENSE-MIT"),
];
const PROGRAM: &str = "usr/bin/plimsoll";
const PAGES: &str = "usr/share/man/man1";
/// What others wrote of the program, and their licences.
const NOTICES: &str = "usr/share/doc/plimsoll/THIRD-PARTY";
/// Where each shell looks for completions.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "usr/share/bash-completion/completions/plimsoll"),
    ("zsh", "usr/share/zsh/vendor-completions/_plimsoll"),
    ("fish", "usr/share/fish/vendor_completions.d/plimsoll.fish"),
];
/// What is an administrator's to change.
const SETTINGS: &str = "etc";
/// Scripts of the package.
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// Puts all files below `root`.
pub(super) fn files(program: &Path, root: &Path) -> Result<()> {
    let installed = place(root, PROGRAM)?;
    // Symbols are a third of the program and tell a user nothing.
    cargo::run(Command::new("strip").arg("-o").arg(&installed).arg(program))?;
    for (from, to) in FILES {
        copy(&cargo::root().join(from), &place(root, to)?)?;
    }
    let book = cargo::root().join("docs");
    for chapter in listed(&book)?.iter().filter(|path| path.extension().is_some_and(|it| it == "md")) {
        let name =
            chapter.file_name().and_then(|name| name.to_str()).context("a chapter's name is not text")?;
        copy(chapter, &place(root, &format!("usr/share/doc/plimsoll/docs/{name}"))?)?;
    }
    cargo::run(Command::new(&installed).arg("man").arg(root.join(PAGES)))?;
    for (shell, to) in COMPLETIONS {
        let place = place(root, to)?;
        let text = File::create(&place).with_context(|| format!("cannot make {}", place.display()))?;
        cargo::run(Command::new(&installed).args(["completions", shell]).stdout(text))?;
    }
    let notices = place(root, NOTICES)?;
    fs::write(&notices, notices::text()?).with_context(|| format!("cannot write {}", notices.display()))?;
    let changelog = root.join("usr/share/doc/plimsoll/changelog");
    for path in listed(&root.join(PAGES))?.iter().chain([&changelog, &notices]) {
        // Without a name and a time.
        cargo::run(Command::new("gzip").arg("-n9").arg(path))?;
    }
    Ok(())
}

/// Adds what dpkg reads, after everything else is there.
pub(super) fn control(package: &Package, root: &Path) -> Result<()> {
    let debian = root.join("DEBIAN");
    let mut paths = Vec::new();
    walk(root, &mut paths)?;
    paths.retain(|path| path.is_file());
    let size_kib: u64 = paths
        .iter()
        .map(|path| fs::metadata(path).map(|it| it.len().div_ceil(1024)))
        .sum::<std::io::Result<_>>()?;
    let shown = |path: &Path| path.strip_prefix(root).unwrap_or(path).display().to_string();
    let settings = paths.iter().map(|path| shown(path)).filter(|path| path.starts_with(SETTINGS));
    let settings: String = settings.map(|path| format!("/{path}\n")).collect();
    let program = root.join(PROGRAM);
    let bytes = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let libc = newest_libc(&bytes).context("the program needs no version of the C library: is it one?")?;
    let description = package.description.as_deref().context("the package plimsoll has no description")?;
    let text = format!(
        "Package: plimsoll\nVersion: {}\nArchitecture: amd64\nSection: admin\nPriority: optional\n\
         Maintainer: The plimsoll developers <plimsoll-rs@users.noreply.github.com>\n\
         Homepage: https://github.com/plimsoll-rs/plimsoll\nInstalled-Size: {size_kib}\n\
         Depends: libc6 (>= 2.{libc}), libgcc-s1\nDescription: {description}\n \
         plimsoll pages, shares and compresses the memory of virtual machines. The package\n \
         neither enables nor starts its daemon: see plimsoll-daemon(1) and /etc/plimsoll.\n",
        package.version
    );
    fs::create_dir_all(&debian).with_context(|| format!("cannot make {}", debian.display()))?;
    for (name, text) in [("control", &text), ("conffiles", &settings)] {
        fs::write(debian.join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    let contrib = cargo::root().join("contrib/debian");
    for script in SCRIPTS {
        copy(&contrib.join(script), &debian.join(script))?;
    }
    // With the text of the one licence that Debian does not have: its lines as a field's.
    let read =
        |path: PathBuf| fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()));
    let licence = read(cargo::root().join("LICENSE-MIT"))?;
    let lines =
        licence.lines().map(|line| if line.is_empty() { " .\n".to_owned() } else { format!(" {line}\n") });
    let copyright = read(contrib.join("copyright"))? + &lines.collect::<String>();
    let place = root.join("usr/share/doc/plimsoll/copyright");
    fs::write(&place, copyright).with_context(|| format!("cannot write {}", place.display()))
}

/// Gives everything the same time and the rights that its place says.
pub(super) fn settle(root: &Path, epoch: u64) -> Result<()> {
    let mut paths = Vec::new();
    walk(root, &mut paths)?;
    // What is inside first: changing it changes the folder's time.
    for path in paths.iter().rev() {
        let name = path.strip_prefix(root).unwrap_or(path);
        let is_run = path.is_dir()
            || name == Path::new(PROGRAM)
            || SCRIPTS.iter().any(|script| name == Path::new("DEBIAN").join(script));
        let settled = fs::set_permissions(path, Permissions::from_mode(if is_run { 0o755 } else { 0o644 }));
        let settled = settled.and_then(|()| File::open(path)?.set_modified(time_of(epoch)));
        settled.with_context(|| format!("cannot settle {}", path.display()))?;
    }
    Ok(())
}

/// The newest minor version of glibc 2 whose symbols a program names.
fn newest_libc(program: &[u8]) -> Option<u32> {
    const PREFIX: &[u8] = b"\0GLIBC_2.";
    let versions = program.windows(PREFIX.len()).enumerate().filter(|(_, window)| *window == PREFIX);
    let minor = |(at, _): (usize, &[u8])| {
        let digits =
            program.get(at + PREFIX.len()..)?.iter().map_while(|byte| char::from(*byte).to_digit(10));
        Some(digits.take(3).fold(0, |number, digit| number * 10 + digit))
    };
    versions.filter_map(minor).max()
}

/// Where a file goes, its folder made.
fn place(root: &Path, to: &str) -> Result<PathBuf> {
    let place = root.join(to);
    let folder = place.parent().unwrap_or(root);
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    ensure!(!place.exists(), "two files go to {to}");
    Ok(place)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("cannot copy {}", from.display()))
}

/// What is in a folder, sorted.
pub(super) fn listed(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// A folder and everything in it, folders before what they hold.
pub(super) fn walk(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<()> {
    paths.push(folder.to_owned());
    for path in listed(folder)? {
        if path.is_symlink() || !path.is_dir() {
            paths.push(path);
        } else {
            walk(&path, paths)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_of_the_c_library_is_found_and_is_no_other_text() {
        assert_eq!(newest_libc(b"\0GLIBC_2.9\0\0GLIBC_2.34\0GLIBC_2.3.4\0xGLIBC_2.99\0"), Some(34));
        assert_eq!(newest_libc(b"GLIBCXX_2.34\0"), None);
    }

    #[test]
    fn every_file_of_the_table_is_there_and_goes_somewhere_else() {
        let root = cargo::root();
        let mut places: Vec<&str> = FILES.iter().map(|(_, to)| *to).collect();
        assert!(FILES.iter().all(|(from, _)| root.join(from).is_file()));
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), FILES.len());
    }
}
