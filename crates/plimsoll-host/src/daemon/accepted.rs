//! The settings that were accepted last, kept for the next manager.
//!
//! Enters: texts of settings files that are in force. Leaves: a file in the daemon's directory, whole or as it was before; from it the
//! settings of a manager that begins. What must never happen: settings that come into force because a manager died: files are read when the
//! daemon begins and when that is asked for (SIGHUP), and what was refused then is not in force for anybody.
//!
//! ```text
//! DIRECTORY/settings.json   {"/etc/plimsoll/plimsoll.toml": "[host]\n...", "/etc/plimsoll/machines.d/web.toml": "..."}
//! ```
use crate::config::{Config, Texts};
use crate::helm::kept::replace;
use plimsoll_linux::explain;
use std::io;
use std::path::{Path, PathBuf};

/// What the file is called.
pub(super) const ACCEPTED: &str = "settings.json";

/// Where they are kept.
#[derive(Clone, Debug)]
pub(super) struct Accepted(PathBuf);

impl Accepted {
    pub(super) fn of(directory: &Path) -> Self {
        Self(directory.join(ACCEPTED))
    }

    /// The settings of a manager that begins, and what is to be said of them: those accepted last; where nothing was accepted yet, what
    /// the file says now.
    pub(super) fn begin(&self, file: &Path) -> (Config, Option<String>) {
        let now = Config::read_texts(file);
        let kept = match self.kept() {
            Ok(kept) => kept,
            Err(error) => {
                let note = format!("what was kept of the settings in {:?} cannot be read: {error}", self.0);
                return (now.map(|(config, _)| config).unwrap_or_default(), Some(note));
            }
        };
        let Some(kept) = kept else {
            return match now {
                Ok((config, texts)) => (config, self.keep(&texts).err()),
                Err(error) => {
                    (Config::default(), Some(format!("the settings are not in force: {}", explain(&error))))
                }
            };
        };
        let now = match now {
            Ok((config, texts)) if texts == kept => return (config, None),
            now => now,
        };
        match Config::of_texts(file, &kept) {
            Ok(then) => {
                let why = now.err().map(|error| format!(": {}", explain(&error))).unwrap_or_default();
                let note = format!(
                    "the settings that were accepted last are in force; {file:?} says something else by now, and is read when \
                     the daemon is told to (SIGHUP){why}"
                );
                (then, Some(note))
            }
            // Of a build that understood them in another way.
            Err(error) => {
                let note = format!(
                    "the settings that were accepted last make no sense any more: {}",
                    explain(&error)
                );
                (now.map(|(config, _)| config).unwrap_or_default(), Some(note))
            }
        }
    }

    /// The same settings for who has no time for files that may lie anywhere: those are read, and kept, only where nothing accepted can be.
    pub(super) fn in_force(&self, file: &Path) -> Config {
        let kept = self.kept().ok().flatten().and_then(|kept| Config::of_texts(file, &kept).ok());
        kept.unwrap_or_else(|| self.begin(file).0)
    }

    fn kept(&self) -> io::Result<Option<Texts>> {
        match std::fs::read(&self.0) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps what was accepted.
    ///
    /// # Errors
    /// A sentence, where the next manager will not have it.
    pub(super) fn keep(&self, texts: &Texts) -> Result<(), String> {
        let text = serde_json::to_vec_pretty(texts).map_err(io::Error::from);
        text.and_then(|text| replace(&self.0, &text))
            .map_err(|error| format!("the settings are in force and cannot be kept in {:?}: {error}", self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_was_accepted_stays_in_force_whatever_becomes_of_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let (file, more) = (folder.path().join("host.toml"), folder.path().join("groups.d/b.toml"));
        fs::create_dir(folder.path().join("groups.d")).unwrap();
        fs::write(&file, "[group.a]\nshares = 7\n").unwrap();
        fs::write(&more, "shares = 8\n").unwrap();
        let accepted = Accepted::of(folder.path());
        let (first, note) = accepted.begin(&file);
        assert_eq!((first.groups.len(), note), (2, None));
        assert_eq!(accepted.begin(&file), (first.clone(), None));
        assert_eq!(accepted.in_force(&file), first);
        for text in ["[group.a]\nshares = 0\n", "[group.a]\nshares = 9\n", "nonsense"] {
            fs::write(&file, text).unwrap();
            let (config, note) = accepted.begin(&file);
            assert_eq!((&config, &accepted.in_force(&file)), (&first, &first), "{text}");
            assert!(note.unwrap().contains("accepted last are in force"), "{text}");
        }
        fs::remove_dir_all(folder.path().join("groups.d")).unwrap();
        fs::remove_file(&file).unwrap();
        assert_eq!(accepted.begin(&file).0, first);
        fs::write(&file, "[group.c]\nshares = 9\n").unwrap();
        let (next, texts) = Config::read_texts(&file).unwrap();
        accepted.keep(&texts).unwrap();
        assert_eq!(accepted.begin(&file), (next, None));
    }

    #[test]
    fn a_manager_of_a_daemon_without_settings_that_make_sense_keeps_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("host.toml");
        fs::write(&file, "nonsense").unwrap();
        let accepted = Accepted::of(folder.path());
        let (config, note) = accepted.begin(&file);
        assert_eq!(config, Config::default());
        assert!(note.unwrap().contains("the settings are not in force"));
        assert!(!folder.path().join(ACCEPTED).exists());
        let lost = Accepted::of(Path::new("/proc/self"));
        fs::write(&file, "[group.a]\nshares = 7\n").unwrap();
        assert!(lost.begin(&file).1.unwrap().contains("cannot be kept in"));
    }
}
