//! The texts that settings are put together from.
//!
//! Enters: paths. Leaves: what the files say, or what they said once: a manager that follows another has the settings that were accepted
//! last, whatever has become of the files. What must never happen: settings of which a part is from then and a part from now.
use plimsoll_types::ByteCount;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Larger files are none that people write: 10,000 machines take a fifth of it.
const FILE_MAX: u64 = 4 << 20;

/// Texts of files, by their paths.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Texts(BTreeMap<PathBuf, String>);

/// Where texts come from.
pub(super) enum Texted<'a> {
    /// From the files, and they are noted.
    Now(&'a mut Texts),
    /// From what was noted.
    Then(&'a Texts),
}

impl Texted<'_> {
    /// What a file says.
    pub(super) fn text(&mut self, path: &Path) -> io::Result<String> {
        match self {
            Self::Now(noted) => {
                let text = text_of(path)?;
                noted.0.insert(path.to_owned(), text.clone());
                Ok(text)
            }
            Self::Then(noted) => noted.0.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into()),
        }
    }

    /// The settings files of a folder, by the names that they stand for. A folder that is not there has none.
    pub(super) fn folder(&self, path: &Path) -> io::Result<Vec<(String, PathBuf)>> {
        match self {
            Self::Now(_) => folder(path),
            Self::Then(noted) => {
                let its = noted.0.keys().filter(|file| file.parent() == Some(path));
                Ok(its.filter_map(|file| Some((stem(file)?, file.clone()))).collect())
            }
        }
    }
}

/// The text of a file that people write.
fn text_of(path: &Path) -> io::Result<String> {
    opened(path).and_then(|(file, _)| text_in(file))
}

/// A file, and what the system says of it.
pub(crate) fn opened(path: &Path) -> io::Result<(File, Metadata)> {
    let file = std::fs::OpenOptions::new().read(true).custom_flags(nonblocking()).open(path)?;
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is no file"));
    }
    Ok((file, found))
}

/// What is in it.
pub(crate) fn text_in(file: File) -> io::Result<String> {
    let mut text = String::new();
    if file.take(FILE_MAX + 1).read_to_string(&mut text)? > usize::try_from(FILE_MAX).unwrap_or(usize::MAX) {
        return Err(io::Error::other(format!("it is larger than {}", ByteCount(FILE_MAX))));
    }
    Ok(text)
}

/// Opening something that is no file is to fail, not to wait for its other end.
fn nonblocking() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits().cast_signed()
}

fn folder(path: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        found.extend(stem(&path).map(|name| (name, path)));
    }
    found.sort();
    Ok(found)
}

/// The name that a file stands for, if it is one of settings.
fn stem(path: &Path) -> Option<String> {
    let is_one = |name: &&str| !name.starts_with('.') && path.extension().is_some_and(|it| it == "toml");
    path.file_stem().and_then(|name| name.to_str()).filter(is_one).map(str::to_owned)
}
