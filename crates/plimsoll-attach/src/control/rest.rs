//! What the two REST interfaces have in common: JSON in, JSON out, errors in the VMM's words.
use super::error::{ControlError, quote};
use super::http::{Answer, Client, Method};
use plimsoll_types::ByteCount;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// One request.
#[derive(Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) method: Method,
    pub(crate) path: &'a str,
    pub(crate) body: Option<&'a Value>,
}

impl<'a> Request<'a> {
    pub(crate) fn get(path: &'a str) -> Self {
        Self { method: Method::Get, path, body: None }
    }

    fn name(self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

/// Asks for something that is answered with a description. What the description does not promise is ignored.
pub(crate) fn ask<T: DeserializeOwned>(client: &mut Client, request: Request<'_>) -> Result<T, ControlError> {
    let answer = succeed(client, request)?;
    serde_json::from_slice(&answer.body)
        .map_err(|_| garbage(client, request, "the documented description", &answer.body))
}

/// Asks for the description of something that the machine may lack: it was not configured, or this version does not have it.
pub(crate) fn ask_if_there<T: DeserializeOwned>(
    client: &mut Client,
    path: &str,
) -> Result<Option<T>, ControlError> {
    match ask(client, Request::get(path)) {
        Ok(found) => Ok(Some(found)),
        Err(ControlError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Asks for something that is only done.
pub(crate) fn tell(client: &mut Client, request: Request<'_>) -> Result<(), ControlError> {
    succeed(client, request).map(drop)
}

/// A size the VMM gave in MiB.
pub(crate) fn mib(client: &Client, path: &str, count: u64) -> Result<ByteCount, ControlError> {
    let bytes = count.checked_mul(1 << 20).map(ByteCount);
    bytes.ok_or_else(|| garbage(client, Request::get(path), "a size in MiB", count.to_string().as_bytes()))
}

pub(crate) fn garbage(
    client: &Client,
    request: Request<'_>,
    expected: &'static str,
    found: &[u8],
) -> ControlError {
    ControlError::Garbage {
        interface: client.interface().to_owned(),
        request: request.name(),
        expected,
        found: quote(&String::from_utf8_lossy(found)),
    }
}

fn succeed(client: &mut Client, request: Request<'_>) -> Result<Answer, ControlError> {
    let answer = client.exchange(request.method, request.path, request.body)?;
    if (200..300).contains(&answer.status) {
        return Ok(answer);
    }
    Err(ControlError::Refused {
        interface: client.interface().to_owned(),
        request: request.name(),
        text: words(&answer),
    })
}

/// What a VMM says of an error: Firecracker an object with `fault_message`, Cloud Hypervisor a list from effect to cause,
/// either of them now and then nothing.
fn words(answer: &Answer) -> String {
    let text = match serde_json::from_slice(&answer.body) {
        Ok(Value::Object(fields)) => {
            fields.get("fault_message").and_then(Value::as_str).map(ToOwned::to_owned)
        }
        Ok(Value::Array(chain)) => {
            Some(chain.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(": "))
        }
        Ok(Value::String(text)) => Some(text),
        _ => None,
    };
    let text = text.unwrap_or_else(|| String::from_utf8_lossy(&answer.body).into_owned());
    let quoted = quote(&text);
    if quoted.is_empty() { format!("status {} without a word", answer.status) } else { quoted }
}
