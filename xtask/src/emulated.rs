//! Tests of what this machine lacks, in an emulated one with a kernel built for them: idle flags and DAMON of address spaces are in hardly
//! any kernel that is shipped, and few machines have several NUMA nodes.
//!
//! Enters: a Debian machine, root. Leaves: what a test program said there, and a kernel below `target/idle` that is not built again
//! before what it is to have changes. What must never happen: a test that did not run counting as passed.
use crate::cargo;
use crate::setup;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The sources, and what builds them: package, and a file it is installed by.
const NEEDS: [(&str, &str); 10] = [
    ("linux-source-6.12", SOURCES),
    ("make", "/usr/bin/make"),
    ("gcc", "/usr/bin/gcc"),
    ("bc", "/usr/bin/bc"),
    ("flex", "/usr/bin/flex"),
    ("bison", "/usr/bin/bison"),
    ("xz-utils", "/usr/bin/xz"),
    ("libelf-dev", "/usr/include/libelf.h"),
    ("busybox-static", "/bin/busybox"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
];
const SOURCES: &str = "/usr/src/linux-source-6.12.tar.xz";
/// The folder in it.
const UNPACKED: &str = "linux-source-6.12";
const IMAGE: &str = "arch/x86/boot/bzImage";
const CONFIG: &str = include_str!("emulated.config");
const INIT: &str = include_str!("emulated.init");

/// A machine, and what is to run there.
struct Trial {
    /// Package and target of the test program.
    test: [&'static str; 2],
    /// Its arguments.
    arguments: &'static str,
    /// The machine's processors and memory.
    machine: &'static [&'static str],
    /// What is said where all of it ran and passed.
    passed: &'static str,
    /// What is said where a part did not run.
    left_out: &'static [&'static str],
}

/// Every way to see which pages are used, compared.
pub(crate) fn idle() -> Result<()> {
    run(&Trial {
        test: ["plimsoll-linux", "kernel"],
        arguments: "every_source",
        machine: &["-m", "1G"],
        passed: "test result: ok. 1 passed",
        left_out: &["not compared", "no hints"],
    })
}

/// Machines whose memory is of two NUMA nodes, with a processor each.
pub(crate) fn nodes() -> Result<()> {
    run(&Trial {
        test: ["plimsoll-vmm", "nodes"],
        arguments: "",
        machine: &[
            "-m",
            "2G",
            "-smp",
            "2",
            "-object",
            "memory-backend-ram,id=first,size=1G",
            "-object",
            "memory-backend-ram,id=second,size=1G",
            "-numa",
            "node,nodeid=0,cpus=0,memdev=first",
            "-numa",
            "node,nodeid=1,cpus=1,memdev=second",
        ],
        passed: "test result: ok. 2 passed",
        left_out: &["SKIPPED", "there is one node"],
    })
}

/// Builds what is missing, runs the test, and repeats what it said.
fn run(trial: &Trial) -> Result<()> {
    let missing: Vec<&str> =
        NEEDS.iter().filter(|(_, file)| !Path::new(file).exists()).map(|(package, _)| *package).collect();
    setup::install(&missing)?;
    let folder = cargo::root().join("target/idle");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let image = kernel(&folder)?;
    let archive = initramfs(&folder, &test_program(trial)?, trial.arguments)?;
    let path = folder.join("said");
    println!(
        "running the test in an emulated machine: a minute or some; what it says goes to {}",
        path.display()
    );
    let mut machine = Command::new("qemu-system-x86_64");
    machine.args([
        "-M",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-display",
        "none",
        "-no-reboot",
    ]);
    machine.args(trial.machine);
    machine.arg("-serial").arg(format!("file:{}", path.display()));
    machine.args(["-append", "console=ttyS0 quiet panic=-1"]);
    machine.arg("-kernel").arg(image).arg("-initrd").arg(archive);
    cargo::run(machine.stdin(Stdio::null()))?;
    let said = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let said = String::from_utf8_lossy(&said);
    println!("{said}");
    if !said.contains(trial.passed) || trial.left_out.iter().any(|left_out| said.contains(left_out)) {
        bail!("something did not run, or failed: what it said is above");
    }
    Ok(())
}

/// The kernel's image: built when there is none.
fn kernel(folder: &Path) -> Result<PathBuf> {
    let sources = folder.join(UNPACKED);
    let image = sources.join(IMAGE);
    let asked = folder.join("config");
    if image.exists() && fs::read_to_string(&asked).is_ok_and(|before| before == CONFIG) {
        return Ok(image);
    }
    let path = folder.join("build.log");
    println!("building a kernel: about ten minutes; what is said goes to {}", path.display());
    let log = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    let logged = |command: &mut Command| -> Result<()> {
        cargo::run(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?))
            .with_context(|| format!("see {}", path.display()))
    };
    logged(Command::new("tar").arg("-xf").arg(SOURCES).current_dir(folder))?;
    let make = || {
        let mut make = Command::new("make");
        make.current_dir(&sources);
        make
    };
    logged(make().arg("tinyconfig"))?;
    // What is said last holds.
    let config = sources.join(".config");
    let text = fs::read_to_string(&config).with_context(|| format!("cannot read {}", config.display()))?;
    fs::write(&config, text + CONFIG)?;
    logged(make().arg("olddefconfig"))?;
    let settled = fs::read_to_string(&config)?;
    let unset =
        CONFIG.lines().find(|line| line.starts_with("CONFIG") && !settled.lines().any(|one| one == *line));
    if let Some(line) = unset {
        bail!("these sources have no {line}");
    }
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    logged(make().arg(format!("-j{jobs}")).arg("bzImage"))?;
    fs::write(&asked, CONFIG)?;
    Ok(image)
}

fn test_program(trial: &Trial) -> Result<PathBuf> {
    println!("building the test");
    let [package, test] = trial.test;
    let programs = cargo::test_programs(&["--package", package, "--test", test])?;
    let program = programs.into_iter().next().context("cargo named no program")?;
    Ok(program.program)
}

/// The test program, what it is linked with, and the first process, packed.
fn initramfs(folder: &Path, program: &Path, arguments: &str) -> Result<PathBuf> {
    let root = folder.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::create_dir_all(root.join("bin"))?;
    let put = |from: &Path, to: &str| -> Result<()> {
        let to = root.join(to.trim_start_matches('/'));
        to.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    };
    put("/bin/busybox".as_ref(), "bin/busybox")?;
    symlink("busybox", root.join("bin/sh"))?;
    cargo::run(Command::new("objcopy").arg("--strip-debug").arg(program).arg(root.join("bin/tests")))?;
    let linked = Command::new("ldd").arg(program).output().context("cannot start ldd")?;
    let linked = String::from_utf8_lossy(&linked.stdout).into_owned();
    for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        put(library.as_ref(), library)?;
    }
    fs::write(root.join("init"), INIT.replace("ARGUMENTS", arguments))?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let archive = folder.join("initramfs");
    let mut pack = Command::new("sh");
    pack.args(["-c", "find . | busybox cpio -o -H newc"]).current_dir(&root).stderr(Stdio::null());
    cargo::run(pack.stdout(File::create(&archive)?))?;
    Ok(archive)
}
