//! A QMP server that lies: it stands between a client and a real QEMU, passes everything on, and changes answers about memory.
use crate::manager::PATIENCE;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often it is looked whether what was said is still a lie.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What is said instead of the truth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    /// The guest never moves its balloon.
    Still,
    /// The guest has done what it was asked, and has endless memory available.
    Eager,
    /// The guest has more left than it owns.
    Absurd,
    /// Every command is refused.
    Refusing,
    /// It hangs up when it is asked this.
    HangingUpAt(&'static str),
    /// The answer to this comes when it is no lie any more.
    SilentAt(&'static str),
    /// Once the guest was asked for something, answers are to questions that were not put yet.
    Ahead,
    /// None: all that is said is the truth.
    Nothing,
}

/// A lying server. Dropping it ends it.
pub(crate) struct Liar {
    socket: PathBuf,
    asked: Arc<Mutex<Vec<u64>>>,
    lie: Arc<Mutex<Lie>>,
    is_over: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

/// One client's connection, to it and on to QEMU.
struct Session<'a> {
    lie: &'a Mutex<Lie>,
    /// The sizes the guest was to be left with, oldest first.
    asked: &'a Mutex<Vec<u64>>,
    memory: u64,
}

impl Liar {
    /// Listens at `socket` and speaks for the QEMU that listens at `truth`, whose guest owns `memory`.
    pub(crate) fn start(socket: &Path, truth: &Path, memory: u64, lie: Lie) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (asked, is_over) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let lie = Arc::new(Mutex::new(lie));
        let server = {
            let (asked, is_over, truth) = (Arc::clone(&asked), Arc::clone(&is_over), truth.to_owned());
            let lie = Arc::clone(&lie);
            std::thread::spawn(move || {
                for client in listener.incoming().map_while(Result::ok) {
                    if is_over.load(Ordering::Acquire) {
                        break;
                    }
                    let session = Session { lie: &lie, asked: &asked, memory };
                    // Either side may hang up at any time: that ends the session and nothing else.
                    let _ = session.serve(&client, &truth);
                }
            })
        };
        Self { socket: socket.to_owned(), asked, lie, is_over, server: Some(server) }
    }

    /// From the next command on it is another lie.
    pub(crate) fn turn_to(&self, lie: Lie) {
        *self.lie.lock().unwrap_or_else(PoisonError::into_inner) = lie;
    }

    /// The sizes the guest was to be left with, oldest first.
    pub(crate) fn asked(&self) -> Vec<u64> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        // Wakes it.
        drop(UnixStream::connect(&self.socket));
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

impl Session<'_> {
    fn serve(&self, mut client: &UnixStream, truth: &Path) -> std::io::Result<()> {
        let mut qemu = UnixStream::connect(truth)?;
        let mut answers = BufReader::new(qemu.try_clone()?).lines();
        let Some(greeting) = answers.next() else { return Ok(()) };
        writeln!(client, "{}", greeting?)?;
        for line in BufReader::new(client.try_clone()?).lines() {
            let line = line?;
            let command: Value = serde_json::from_str(&line)?;
            let lie = self.lie_now();
            if lie == Lie::Refusing && command["execute"] != "qmp_capabilities" {
                let error = json!({ "class": "GenericError", "desc": "not today" });
                writeln!(client, "{}", json!({ "error": error, "id": command["id"] }))?;
                continue;
            }
            if matches!(lie, Lie::HangingUpAt(asked) if command["execute"] == asked) {
                return Ok(());
            }
            if matches!(lie, Lie::SilentAt(asked) if command["execute"] == asked) {
                let deadline = Instant::now() + PATIENCE;
                while self.lie_now() == lie && Instant::now() < deadline {
                    std::thread::sleep(LOOK_EVERY);
                }
            }
            writeln!(qemu, "{line}")?;
            if command["execute"] == "balloon" {
                let left = command["arguments"]["value"].as_u64().unwrap();
                self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(left);
            }
            for answer in answers.by_ref() {
                let mut answer: Value = serde_json::from_str(&answer?)?;
                let is_event = answer.get("event").is_some();
                if answer.get("return").is_some() {
                    self.lie(lie, &command, &mut answer["return"]);
                }
                if lie == Lie::Ahead && !is_event && !self.asked().is_empty() {
                    answer["id"] = json!(answer["id"].as_u64().unwrap() + 1);
                }
                writeln!(client, "{answer}")?;
                if !is_event {
                    break;
                }
            }
        }
        Ok(())
    }

    fn asked(&self) -> Vec<u64> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lie_now(&self) -> Lie {
        *self.lie.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lie(&self, lie: Lie, command: &Value, answer: &mut Value) {
        let last = self.asked().last().copied();
        match (command["execute"].as_str(), lie) {
            (Some("query-balloon"), Lie::Still) => answer["actual"] = json!(self.memory),
            (Some("query-balloon"), Lie::Eager) => answer["actual"] = json!(last.unwrap_or(self.memory)),
            (Some("query-balloon"), Lie::Absurd) => answer["actual"] = json!(self.memory * 2),
            (Some("qom-get"), Lie::Eager) if command["arguments"]["property"] == "guest-stats" => {
                answer["stats"]["stat-available-memory"] = json!(1_u64 << 60);
                answer["stats"]["stat-total-memory"] = json!(1_u64 << 60);
            }
            _ => {}
        }
    }
}
