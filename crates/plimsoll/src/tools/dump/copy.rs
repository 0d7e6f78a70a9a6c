//! Bytes of guest RAM into a file. What is absent or zero is a hole in the file.
use super::super::said;
use super::{Machine, go_on};
use crate::demo::Interrupt;
use indicatif::ProgressBar;
use plimsoll_attach::RamBacking;
use plimsoll_inspect::{Load, Outside};
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::{Categories, Filter};
use plimsoll_types::{ByteCount, Gpa, PAGE_SIZE};
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Read at once.
const STEP: u64 = 1 << 20;

/// A file that goes again unless it is kept.
pub(super) struct Unfinished {
    path: PathBuf,
    file: File,
    is_kept: bool,
}

impl Unfinished {
    /// For nobody else's eyes: it holds what the guest holds.
    pub(super) fn create(path: &Path) -> Result<Self, String> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|error| format!("cannot make {}: {error}", path.display()))?;
        Ok(Self { path: path.to_owned(), file, is_kept: false })
    }

    /// Whole, it stays.
    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }

    fn cannot_write(&self, error: &io::Error) -> String {
        format!("cannot write {}: {error}", self.path.display())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A copy on its way.
pub(super) struct Copied<'a> {
    machine: &'a Machine,
    interrupt: &'a Interrupt,
    file: &'a Unfinished,
    /// Pages wait here, with where they belong, while the machine stands still.
    kept: Option<Vec<(u64, Vec<u8>)>>,
    written: ByteCount,
}

impl<'a> Copied<'a> {
    pub(super) fn new(
        machine: &'a Machine,
        interrupt: &'a Interrupt,
        in_memory_first: bool,
        file: &'a Unfinished,
    ) -> Self {
        let kept = in_memory_first.then(Vec::new);
        Self { machine, interrupt, file, kept, written: ByteCount(0) }
    }

    /// Copies what these name, once, to where it belongs behind `content`.
    pub(super) fn copy(&mut self, loads: &[Load], content: u64) -> Result<(), String> {
        let mut wanted: Vec<(u64, u64)> =
            loads.iter().map(|load| (load.gpa.0, load.gpa.0 + load.len)).collect();
        wanted.sort_unstable();
        wanted.dedup_by(|next, last| {
            let touches = next.0 <= last.1;
            if touches {
                last.1 = last.1.max(next.1);
            }
            touches
        });
        let all = wanted.iter().map(|(from, to)| to - from).sum();
        // A terminal may hold up whoever writes to it, and then the machine stands still.
        let is_shown = self.kept.is_none() && io::stderr().is_terminal();
        let bar = if is_shown { ProgressBar::new(all) } else { ProgressBar::hidden() };
        for (from, to) in wanted {
            for part in self.machine.ram.parts(Gpa(from), to - from) {
                for (start, len) in self.populated(part.hva)? {
                    let skip = start - part.hva.start().0;
                    self.range(Gpa(part.gpa.0 + skip), len, content + part.offset + skip)?;
                }
                bar.inc(part.hva.len().0);
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Where there is something to read. Of shared memory the page map does not show what is in swap, so all of it is read.
    fn populated(&self, range: HvaRange) -> Result<Vec<(u64, u64)>, String> {
        let ram = self.machine.dossier.range_with(range);
        if !ram.is_some_and(|ram| ram.backing == RamBacking::PrivateAnonymous) {
            return Ok(vec![(range.start().0, range.len().0)]);
        }
        let mut found = Vec::new();
        let told = Categories::ZERO_PAGE;
        let filter = Filter {
            all_of: Categories::empty(),
            any_of: Categories::PRESENT | Categories::SWAPPED,
            report: told,
        };
        let scanned = self.machine.pagemap.scan(range, filter, |run| {
            if run.categories.is_empty() {
                found.push((run.range.start().0, run.range.len().0));
            }
        });
        scanned.map(|()| found).map_err(said)
    }

    fn range(&mut self, gpa: Gpa, len: u64, at: u64) -> Result<(), String> {
        let outside: Outside<'_> = self.machine.outside();
        let mut done = 0;
        while done < len {
            go_on(self.interrupt)?;
            let step = (len - done).min(STEP);
            let mut bytes = vec![0; usize::try_from(step).map_err(said)?];
            outside.bytes(Gpa(gpa.0 + done), &mut bytes).map_err(said)?;
            for (place, page) in (0..).zip(bytes.chunks(PAGE_SIZE)) {
                if page.iter().any(|byte| *byte != 0) {
                    let at = at + done + place * PAGE_SIZE as u64;
                    self.written += ByteCount(page.len() as u64);
                    match &mut self.kept {
                        Some(kept) => kept.push((at, page.to_vec())),
                        None => self.write(page, at)?,
                    }
                }
            }
            done += step;
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8], at: u64) -> Result<(), String> {
        self.file.file.write_all_at(bytes, at).map_err(|error| self.file.cannot_write(&error))
    }

    /// Writes what waits, and the beginning; the file has its whole length then. Gives what in it is not zero.
    pub(super) fn finish(mut self, head: &[u8], ram: ByteCount) -> Result<ByteCount, String> {
        for (at, page) in self.kept.take().unwrap_or_default() {
            go_on(self.interrupt)?;
            self.write(&page, at)?;
        }
        self.write(head, 0)?;
        let len = head.len() as u64 + ram.0;
        self.file.file.set_len(len).map_err(|error| self.file.cannot_write(&error))?;
        Ok(self.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_only_if_it_was_kept_and_never_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("core");
        drop(Unfinished::create(&path).unwrap());
        assert!(!path.exists());
        let file = Unfinished::create(&path).unwrap();
        file.keep();
        assert!(Unfinished::create(&path).is_err_and(|why| why.contains("cannot make")));
        assert!(path.exists());
    }
}
