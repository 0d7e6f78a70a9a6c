//! The second serial port: commands come in, lines go out. The kernel does not write there.
use crate::protocol::Line;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::time::Duration;

const PORT: &str = "/dev/ttyS1";
/// A line longer than this is noise, and so is what came before its end.
const LINE_MAX: usize = 4096;

/// The port, and what was read from it and is not a whole line yet.
#[derive(Debug)]
pub(crate) struct Console {
    port: File,
    partial: Vec<u8>,
    lines: VecDeque<String>,
}

impl Console {
    /// Opens the port without echo and without any other help.
    pub(crate) fn open() -> io::Result<Self> {
        let port = OpenOptions::new().read(true).write(true).open(PORT)?;
        let mut settings = tcgetattr(&port)?;
        settings.make_raw();
        tcsetattr(&port, OptionalActions::Now, &settings)?;
        Ok(Self { port, partial: Vec::new(), lines: VecDeque::new() })
    }

    /// Says something, in one write.
    pub(crate) fn say(&mut self, line: &Line) -> io::Result<()> {
        self.port.write_all(format!("{line}\n").as_bytes())
    }

    /// The next line, if one comes in time.
    pub(crate) fn next(&mut self, patience: Duration) -> io::Result<Option<String>> {
        if self.lines.is_empty() {
            self.read(patience)?;
        }
        Ok(self.lines.pop_front())
    }

    fn read(&mut self, patience: Duration) -> io::Result<()> {
        let timeout = Timespec::try_from(patience).map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(&self.port, PollFlags::IN)], Some(&timeout))? == 0 {
            return Ok(());
        }
        let mut bytes = [0; 256];
        let length = self.port.read(&mut bytes)?;
        for &byte in bytes.get(..length).unwrap_or_default() {
            match byte {
                b'\n' => {
                    self.lines.push_back(String::from_utf8_lossy(&self.partial).into_owned());
                    self.partial.clear();
                }
                byte => self.partial.push(byte),
            }
        }
        if self.partial.len() > LINE_MAX {
            self.partial.clear();
        }
        Ok(())
    }
}
