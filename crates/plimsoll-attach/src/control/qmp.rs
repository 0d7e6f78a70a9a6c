//! What the QEMU driver needs of a connection to QEMU's monitor, whoever holds it.
use super::error::ControlError;
use serde_json::Value;

/// QEMU's machine protocol, past its greeting: commands are answered, events come by themselves.
///
/// # Errors
/// Both operations fail with a [`ControlError`] within the connection's patience; an answer `{"error": …}` is
/// [`ControlError::Refused`] with its description as text.
pub trait Qmp: Send {
    /// The connection in words, for messages.
    fn interface(&self) -> &str;

    /// Runs a command and returns what is under `return`. Without arguments, `arguments` is `Value::Null`.
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ControlError>;

    /// The events since the last call, oldest first, without waiting. [`ControlError::Unsupported`] if none ever come.
    fn events(&mut self) -> Result<Vec<QmpEvent>, ControlError>;
}

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// Its name, such as `STOP`.
    pub name: String,
    /// What is under `data`, or `Null`.
    pub data: Value,
}
