//! Rules about source files.
//!
//! * `unsafe-room`: an opt-in to unsafe code is an `expect` with a reason, and stands in a room that may have one. That
//!   there is no unsafe without an opt-in is rustc's business. The guest image and the bare-metal host are unsafe throughout and need
//!   none.
//! * `file-length`: a file is a room, not a house.
//! * `no-leftovers`: nothing unfinished, nothing switched off.
use super::{Violation, shown};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Folders whose files may opt into unsafe code, and the one file that calls what peers have made unsafe.
const UNSAFE_ROOMS: [&str; 6] = [
    "crates/plimsoll-sys/",
    "crates/plimsoll-vmm/",
    "crates/plimsoll-guest/image/",
    "crates/plimsoll-metal/image/",
    "crates/plimsoll-metal/caller/",
    "crates/plimsoll-mmu/examples/count/peers.rs",
];
/// The longest a file may be.
const LINES_MAX: usize = 900;
/// Written in halves, or this file would violate its own rule.
const LINT: &str = concat!("unsafe", "_code");
const LEFTOVER_WORDS: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
const LEFTOVER_CODE: [&str; 3] =
    [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("#[", "ignore")];

/// Reads every Rust file below `crates` and `xtask`.
pub(super) fn check(root: &Path) -> Result<Vec<Violation>> {
    let mut files = Vec::new();
    for folder in ["crates", "xtask"] {
        rust_files(&root.join(folder), &mut files)?;
    }
    files.sort();
    let mut violations = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        check_file(&shown(&file), &text, &mut violations);
    }
    Ok(violations)
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn check_file(path: &str, text: &str, violations: &mut Vec<Violation>) {
    let lines = text.lines().count();
    if lines > LINES_MAX {
        let found = format!("{lines} lines; divide what has more than {LINES_MAX}");
        violations.push(Violation { rule: "file-length", place: path.to_owned(), found });
    }
    for (index, line) in text.lines().enumerate() {
        let word = LEFTOVER_WORDS.iter().find(|word| has_word(line, word));
        let code = LEFTOVER_CODE.iter().find(|code| line.contains(*code));
        if let Some(found) = word.or(code) {
            let place = format!("{path}:{}", index + 1);
            let found = format!("{found} is left over; finish it or open an issue");
            violations.push(Violation { rule: "no-leftovers", place, found });
        }
    }
    if let Some(found) = unsafe_opt_in(path, text) {
        violations.push(Violation { rule: "unsafe-room", place: path.to_owned(), found });
    }
}

/// True when the word stands alone.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(is_part)
    })
}

/// What is wrong with how a file opts into unsafe code, if it does.
fn unsafe_opt_in(path: &str, text: &str) -> Option<String> {
    // However the attribute is broken into lines.
    let dense: String = text.split_whitespace().collect();
    for (at, _) in dense.match_indices(LINT) {
        let (before, after) = (&dense[..at], &dense[at + LINT.len()..]);
        if before.ends_with("forbid(") {
            continue;
        }
        if !(before.ends_with("expect(") && after.starts_with(",reason=")) {
            return Some(format!("the lint {LINT} is changed other than by `expect` with a reason"));
        }
        if !UNSAFE_ROOMS.iter().any(|room| path.starts_with(room)) {
            return Some(format!("unsafe code belongs in one of {}", UNSAFE_ROOMS.join(", ")));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(path: &str, text: &str) -> Vec<&'static str> {
        let mut violations = Vec::new();
        check_file(path, text, &mut violations);
        violations.iter().map(|violation| violation.rule).collect()
    }

    fn attribute(level: &str, reason: &str) -> String {
        format!("#![{level}(\n    {LINT}{reason}\n)]\n")
    }

    #[test]
    fn unsafe_needs_the_right_room_and_a_reason() {
        let reason = ", reason = \"maps memory\"";
        assert!(rules("crates/plimsoll-sys/src/a.rs", &attribute("expect", reason)).is_empty());
        assert_eq!(rules("crates/plimsoll-core/src/a.rs", &attribute("expect", reason)), ["unsafe-room"]);
        assert_eq!(rules("crates/plimsoll-sys/src/a.rs", &attribute("expect", "")), ["unsafe-room"]);
        assert_eq!(rules("crates/plimsoll-sys/src/a.rs", &attribute("warn", reason)), ["unsafe-room"]);
        assert!(rules("crates/plimsoll-core/src/lib.rs", &attribute("forbid", "")).is_empty());
    }

    #[test]
    fn leftovers_are_words_and_not_parts_of_them() {
        assert_eq!(rules("a.rs", &format!("// {}: later", LEFTOVER_WORDS[1])), ["no-leftovers"]);
        assert_eq!(rules("a.rs", &format!("    {})", LEFTOVER_CODE[0])), ["no-leftovers"]);
        assert!(rules("a.rs", &format!("\"/tmp/{0}{0}\"", LEFTOVER_WORDS[2])).is_empty());
    }

    #[test]
    fn a_file_may_have_900_lines_and_no_more() {
        assert!(rules("a.rs", &"\n".repeat(900)).is_empty());
        assert_eq!(rules("a.rs", &"\n".repeat(901)), ["file-length"]);
    }
}
