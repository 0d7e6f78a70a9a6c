//! What an operator has said by the API, kept for the next manager.
//!
//! Enters: words. Leaves: a file in the daemon's directory, whole or as it was before: it is written beside and moved into its
//! place. What must never happen: words of a newer version read past, or written over.
//!
//! ```text
//! DIRECTORY/said.json   {"version": 1, "budget_bytes": 8589934592,
//!                        "machines": {"web1": {"attached": true, "paused": false, "qmp": "/run/web1.qmp",
//!                                              "settings": {"kind": "guarantee", "reservation_bytes": 536870912, ...}}}}
//! ```
use crate::api::Settings;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The version written, and the newest that is read.
const VERSION: u32 = 1;
/// What the file is called.
pub const SAID: &str = "said.json";

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Words {
    version: u32,
    /// What machines share, if something else was said than when the daemon was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget_bytes: Option<u64>,
    /// About machines, by name.
    #[serde(default)]
    pub machines: BTreeMap<String, Word>,
}

/// What was said about a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Word {
    /// Whether it is to be managed from outside; nothing where only the settings file says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attached: Option<bool>,
    /// Whether nothing is taken from it.
    pub paused: bool,
    /// Its settings, all of them, if any were said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
    /// Its QMP monitor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qmp: Option<PathBuf>,
    /// Its API socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api: Option<PathBuf>,
}

impl Default for Words {
    fn default() -> Self {
        Self { version: VERSION, budget_bytes: None, machines: BTreeMap::new() }
    }
}

/// What was said cannot be read or kept.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeptError {
    /// The file cannot be read or written.
    #[error("what was said by the API cannot be kept in {path:?}")]
    File {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is of a newer plimsoll.
    #[error(
        "{path:?} is of version {found}, and this plimsoll reads up to {VERSION}: start a newer one, or move the file away"
    )]
    Newer {
        /// Its path.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// It says something that cannot be.
    #[error("{path:?} makes no sense: mend it, or move it away and say again what it said")]
    Damaged {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// The file, and what it says.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    words: Words,
}

impl Kept {
    /// Reads what was said to a daemon of that directory. Nothing was where there is no file.
    ///
    /// # Errors
    /// [`KeptError`].
    pub fn open(directory: &Path) -> Result<Self, KeptError> {
        let path = directory.join(SAID);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { path, words: Words::default() });
            }
            Err(source) => return Err(KeptError::File { path, source }),
        };
        // Its version first: what a newer one says may make no sense here.
        let version = serde_json::from_slice::<serde_json::Value>(&text).ok();
        match version.as_ref().and_then(|value| value["version"].as_u64()) {
            Some(found) if found > u64::from(VERSION) => Err(KeptError::Newer { path, found }),
            _ => match serde_json::from_slice(&text) {
                Ok(words) => Ok(Self { path, words }),
                Err(source) => Err(KeptError::Damaged { path, source }),
            },
        }
    }

    /// What was said.
    pub const fn words(&self) -> &Words {
        &self.words
    }

    /// What was said about a machine.
    pub fn word(&self, name: &str) -> Option<&Word> {
        self.words.machines.get(name)
    }

    /// Whether nothing is to be taken from machines of that name.
    pub fn is_paused(&self, name: &str) -> bool {
        self.word(name).is_some_and(|word| word.paused)
    }

    /// Keeps something else. What was kept stays where that fails.
    ///
    /// # Errors
    /// [`KeptError::File`].
    pub fn change(&mut self, change: impl FnOnce(&mut Words)) -> Result<(), KeptError> {
        let mut words = self.words.clone();
        change(&mut words);
        words.machines.retain(|_, word| *word != Word::default());
        let failed = |source| KeptError::File { path: self.path.clone(), source };
        let text = serde_json::to_vec_pretty(&words).map_err(|error| failed(error.into()))?;
        replace(&self.path, &text).map_err(failed)?;
        self.words = words;
        Ok(())
    }
}

/// Has a file say that; it stays as it was where that fails. It is its owner's own: others may come as far as to the daemon's directory.
pub(crate) fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut options = File::options();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(&beside)?.write_all(text)?;
    std::fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_again_and_what_says_nothing_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let mut kept = Kept::open(folder.path()).unwrap();
        kept.change(|words| {
            words.budget_bytes = Some(1 << 30);
            words.machines.entry("web".to_owned()).or_default().paused = true;
            words.machines.entry("db".to_owned()).or_default().paused = false;
        })
        .unwrap();
        let again = Kept::open(folder.path()).unwrap();
        assert_eq!(again.words(), kept.words());
        assert!(again.word("web").unwrap().paused && again.word("db").is_none());
    }

    #[test]
    fn a_newer_or_damaged_file_is_refused_in_a_sentence_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(SAID);
        for (text, expected) in [
            (r#"{"version": 2, "more": []}"#, "is of version 2, and this plimsoll reads up to 1"),
            (r#"{"version": 1, "machins": {}}"#, "makes no sense: mend it"),
            (r#"{"version": 1, "machines": {"web": {"settings": {"shares": -1}}}}"#, "makes no sense"),
            ("", "makes no sense"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Kept::open(folder.path()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn what_cannot_be_written_is_not_taken_over() {
        let mut kept = Kept::open(Path::new("/proc/self")).unwrap();
        let failed = kept.change(|words| words.budget_bytes = Some(1));
        assert!(matches!(failed, Err(KeptError::File { .. })), "{failed:?}");
        assert_eq!(kept.words(), &Words::default());
    }
}
