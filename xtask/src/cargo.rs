//! Starting cargo, and what it knows about the workspace.
//!
//! Enters: the root of the workspace, known since compilation. Leaves: commands ready to run, and the parts of
//! `cargo metadata` that the other rooms read.
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::convert::Infallible;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The only target there is; naming it keeps other platforms' dependencies out of `cargo metadata`.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The folder of the root `Cargo.toml`.
pub(crate) fn root() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// The cargo that started this program, in the root folder.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command to its end. An error names the command.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}

/// Builds a package for speed and becomes its program. `arguments` adds to its command line, and is told where cargo builds.
pub(crate) fn become_program(
    package: &str,
    arguments: impl FnOnce(&mut Command, &Path),
) -> Result<Infallible> {
    run(cargo().args(["build", "--quiet", "--release", "--locked", "--package", package]))?;
    let target = metadata(&root().join("Cargo.toml"))?.target_directory;
    let program = target.join("release").join(package);
    let mut command = Command::new(&program);
    arguments(&mut command, &target);
    Err(command.exec()).with_context(|| format!("cannot start {}", program.display()))
}

/// What `cargo metadata` says.
#[derive(Deserialize)]
pub(crate) struct Metadata {
    /// All packages that are built, dependencies among them.
    pub(crate) packages: Vec<Package>,
    /// The identities of those that are members.
    workspace_members: Vec<String>,
    /// Where cargo builds.
    pub(crate) target_directory: PathBuf,
}

/// One package.
#[derive(Deserialize)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// Its identity in cargo's messages.
    pub(crate) id: String,
    /// An SPDX expression, if it states one.
    pub(crate) license: Option<String>,
    /// One sentence.
    pub(crate) description: Option<String>,
    /// Where its source is.
    pub(crate) repository: Option<String>,
    /// For a registry's search.
    pub(crate) keywords: Vec<String>,
    /// For a registry's lists.
    pub(crate) categories: Vec<String>,
    /// Registries it may be published to; empty means none, absent means any.
    pub(crate) publish: Option<Vec<String>>,
    /// Its `Cargo.toml`.
    pub(crate) manifest_path: PathBuf,
    /// What it names as dependencies, of every kind.
    pub(crate) dependencies: Vec<Dependency>,
    /// What is built from it.
    pub(crate) targets: Vec<Target>,
}

/// A dependency as its package names it.
#[derive(Deserialize)]
pub(crate) struct Dependency {
    /// The package's own name, whatever it is renamed to.
    pub(crate) name: String,
}

/// A library, program or test.
#[derive(Deserialize)]
pub(crate) struct Target {
    /// Its name.
    pub(crate) name: String,
    /// What it is.
    pub(crate) kind: Vec<String>,
}

impl Package {
    /// Its folder.
    pub(crate) fn folder(&self) -> &Path {
        self.manifest_path.parent().unwrap_or(&self.manifest_path)
    }

    /// True for a package with a library.
    pub(crate) fn has_library(&self) -> bool {
        self.targets.iter().any(|target| target.is("lib"))
    }
}

impl Target {
    /// True when this is one of its kinds.
    pub(crate) fn is(&self, kind: &str) -> bool {
        self.kind.iter().any(|own| own == kind)
    }
}

impl Metadata {
    /// The packages of the workspace.
    pub(crate) fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| self.workspace_members.contains(&package.id))
    }
}

/// A program that cargo has built.
pub(crate) struct TestProgram {
    /// Of which package, as in [`Package::id`].
    pub(crate) package_id: String,
    /// Which of its targets.
    pub(crate) target: Target,
    /// Where it is.
    pub(crate) program: PathBuf,
}

/// Has the test programs built that the arguments choose. The compiler's messages go to standard error.
pub(crate) fn test_programs(arguments: &[&str]) -> Result<Vec<TestProgram>> {
    /// A line of cargo's JSON messages; only those about programs are of interest.
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        package_id: Option<String>,
        target: Option<Target>,
        profile: Option<Profile>,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }
    let mut command = cargo();
    command.args(["test", "--no-run", "--locked", "--message-format=json-render-diagnostics"]);
    let output =
        command.args(arguments).stderr(Stdio::inherit()).output().context("cannot start cargo test")?;
    if !output.status.success() {
        bail!("the tests do not build; the compiler's messages are above");
    }
    let mut programs = Vec::new();
    for line in output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let message: Message = serde_json::from_slice(line).context("cargo printed something unexpected")?;
        let is_test = message.profile.is_some_and(|profile| profile.test);
        if let (Some(program), Some(package_id), Some(target), true) =
            (message.executable, message.package_id, message.target, is_test)
        {
            programs.push(TestProgram { package_id, target, program });
        }
    }
    Ok(programs)
}

/// Asks cargo about the workspace of a manifest.
pub(crate) fn metadata(manifest: &Path) -> Result<Metadata> {
    let mut command = cargo();
    command.args(["metadata", "--format-version", "1", "--locked", "--filter-platform", TARGET]);
    let output =
        command.arg("--manifest-path").arg(manifest).output().context("cannot start cargo metadata")?;
    if !output.status.success() {
        bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    serde_json::from_slice(&output.stdout).context("cargo metadata printed something unexpected")
}
