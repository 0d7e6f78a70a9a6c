//! The same driver against a QEMU that runs here: its guest has no memory to give, so this is about the machine's side.
use super::hot;
use super::recorded::reply_of;
use plimsoll_attach::control::{
    Control, ControlError, ControlEvent, Feature, HintingCommand, Migration, Qemu, Qmp, QmpEvent, RunState,
};
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A QEMU of our own with its monitor as its standard input and output.
struct Machine {
    process: Child,
    stream: BufReader<UnixStream>,
    events: Vec<QmpEvent>,
}

impl Machine {
    /// `None` if there is no QEMU here.
    fn start(arguments: &[&str]) -> Option<Self> {
        let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
        ours.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out can be set");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-qmp", "stdio"])
            .args(arguments);
        let output = theirs.try_clone().expect("a descriptor can be copied");
        qemu.stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(std::os::fd::OwnedFd::from(output));
        let process = match qemu.spawn() {
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            started => started.expect("QEMU can be started"),
        };
        let mut machine = Self { process, stream: BufReader::new(ours), events: Vec::new() };
        assert!(machine.line().get("QMP").is_some(), "QEMU greets");
        machine.execute("qmp_capabilities", Value::Null).expect("QEMU shakes hands");
        Some(machine)
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("QEMU answers");
        serde_json::from_str(&line).expect("QEMU speaks JSON")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Qmp for Machine {
    fn interface(&self) -> &str {
        "the monitor"
    }

    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        writeln!(self.stream.get_mut(), "{request}").expect("QEMU listens");
        loop {
            let reply = self.line();
            match reply["event"].as_str() {
                Some(name) => {
                    self.events.push(QmpEvent { name: name.to_owned(), data: reply["data"].clone() })
                }
                None => return reply_of(command, &reply),
            }
        }
    }

    fn events(&mut self) -> Result<Vec<QmpEvent>, ControlError> {
        Ok(std::mem::take(&mut self.events))
    }
}

/// The machine, or a word that it cannot be had.
fn machine(arguments: &[&str]) -> Option<Qemu<Machine>> {
    let machine = Machine::start(arguments);
    if machine.is_none() {
        let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|name| name == "qemu"), "qemu is required and not there");
        println!("SKIPPED: no qemu-system-x86_64 in PATH");
    }
    machine.map(Qemu::new)
}

#[test]
fn a_real_qemu_does_what_the_recorded_one_did() {
    let arguments = [
        "-machine",
        "q35",
        "-m",
        "512M,maxmem=4G,slots=2",
        "-object",
        "memory-backend-ram,id=vmem0,size=1G",
        "-device",
        "virtio-mem-pci,id=vm0,memdev=vmem0,requested-size=128M",
        "-device",
        "virtio-balloon-pci,id=balloon0,free-page-reporting=on,deflate-on-oom=on",
    ];
    let Some(mut qemu) = machine(&arguments) else { return };
    let found = qemu.probe().unwrap();
    assert_eq!(found.balloon.and_then(|balloon| balloon.deflate_on_oom), Some(true));
    assert!(
        found.has(Feature::Statistics) && found.has(Feature::FreePageReporting) && found.has(Feature::Events)
    );
    assert_eq!(qemu.run_state().unwrap(), RunState::NotStarted);
    assert_eq!(qemu.migration().unwrap(), Migration::None);
    assert_eq!(qemu.statistics_interval().unwrap(), Duration::ZERO);
    for every in [Duration::from_secs(2), Duration::ZERO] {
        qemu.poll_statistics(every).unwrap();
        assert_eq!(qemu.statistics_interval().unwrap(), every);
    }
    assert_eq!(qemu.statistics().unwrap().available, None);
    qemu.set_balloon(ByteCount::mib(100)).unwrap();
    assert_eq!(qemu.balloon().unwrap().memory, ByteCount::mib(512));
    qemu.request_hot_memory(&hot("vm0"), ByteCount::mib(256)).unwrap();
    qemu.request_hot_memory(&hot("memory modules"), ByteCount::mib(256)).unwrap();
    let now: Vec<ByteCount> = qemu.hot_memory().unwrap().iter().map(|memory| memory.requested).collect();
    assert_eq!(now, [ByteCount::mib(256); 2]);
    assert_eq!(qemu.balloon().unwrap().memory, ByteCount::mib(768));
    assert_eq!(qemu.balloon().unwrap().actual, Some(ByteCount(0)));
    qemu.resume().unwrap();
    assert_eq!(qemu.run_state().unwrap(), RunState::Running);
    qemu.pause().unwrap();
    assert_eq!(qemu.run_state().unwrap(), RunState::Paused);
    assert!(qemu.events().unwrap().contains(&ControlEvent::RunState));
}

#[test]
fn a_real_qemu_hints_while_it_migrates_if_its_balloon_was_started_so() {
    for (is_on, balloon) in
        [(false, "virtio-balloon-pci"), (true, "virtio-balloon-pci,free-page-hint=on,iothread=hints")]
    {
        let arguments = ["-object", "iothread,id=hints", "-device", balloon];
        let Some(mut qemu) = machine(&arguments) else { return };
        let found = qemu.probe().unwrap();
        assert_eq!(found.has(Feature::HintingInMigration), is_on, "{balloon}");
        // Nobody can have it done: there is no command.
        assert!(!found.has(Feature::FreePageHinting) && qemu.hint(HintingCommand::Start).is_err());
    }
}

#[test]
fn a_real_qemu_that_has_no_room_says_so_before_it_is_asked() {
    let Some(mut qemu) = machine(&["-machine", "q35", "-m", "512M,maxmem=600M,slots=1"]) else { return };
    let found = qemu.probe().unwrap();
    assert_eq!((found.balloon, found.hot_memory), (None, Vec::new()));
    let error = qemu.set_balloon(ByteCount::mib(1)).unwrap_err();
    assert!(error.to_string().ends_with("No balloon device has been activated"), "{error}");
}
