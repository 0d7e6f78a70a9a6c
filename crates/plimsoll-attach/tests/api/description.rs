//! The published descriptions: which requests there are, what belongs into their bodies and what their answers look like.
//!
//! Enters: YAML in either dialect (Swagger 2, OpenAPI 3). Leaves: schemas, what of a value violates one, and examples of
//! values that do not.
use serde_json::{Map, Value, json};

/// How much of what may be there an example has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fullness {
    /// Required fields only.
    Minimal,
    /// Every field.
    Full,
}

/// One VMM's interface.
#[derive(Clone, Debug)]
pub(crate) struct Description {
    root: Value,
    /// What stands before every path.
    prefix: &'static str,
}

impl Description {
    pub(crate) fn firecracker() -> Self {
        Self::parse(include_str!("firecracker.yaml"), "")
    }

    pub(crate) fn cloud_hypervisor() -> Self {
        Self::parse(include_str!("cloud-hypervisor.yaml"), "/api/v1")
    }

    fn parse(text: &str, prefix: &'static str) -> Self {
        Self { root: serde_saphyr::from_str(text).expect("the description is YAML"), prefix }
    }

    /// The named schema, wherever the dialect keeps them.
    pub(crate) fn schema(&self, name: &str) -> &Value {
        let found = ["/definitions/", "/components/schemas/"]
            .map(|place| self.root.pointer(&format!("{place}{name}")));
        found.into_iter().flatten().next().unwrap_or_else(|| panic!("no schema {name}"))
    }

    fn operation(&self, method: &str, path: &str) -> Option<&Value> {
        let path = path.strip_prefix(self.prefix)?;
        self.root["paths"].get(path)?.get(method.to_ascii_lowercase())
    }

    /// The schema of an operation's successful answer; `None` if it is answered without a body.
    pub(crate) fn answer(&self, method: &str, path: &str) -> Option<&Value> {
        let success = &self.operation(method, path)?["responses"]["200"];
        success.get("schema").or_else(|| success.pointer("/content/application~1json/schema"))
    }

    /// What is wrong with a request.
    pub(crate) fn violations_of_request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Vec<String> {
        let Some(operation) = self.operation(method, path) else {
            return vec![format!("there is no {method} {path}")];
        };
        let in_body = |parameter: &&Value| parameter["in"] == "body";
        let parameter = operation["parameters"].as_array().into_iter().flatten().find(in_body);
        let described = parameter.or_else(|| operation.get("requestBody"));
        let schema = described.map(|described| match described.get("schema") {
            Some(schema) => schema,
            None => &described["content"]["application/json"]["schema"],
        });
        let is_required = described.is_some_and(|described| described["required"] == true);
        match (schema, body) {
            (Some(schema), Some(body)) => self.violations(schema, body),
            (None, Some(_)) => vec![format!("{method} {path} has no body")],
            (_, None) if is_required => vec![format!("{method} {path} needs a body")],
            (_, None) => Vec::new(),
        }
    }

    fn resolved<'a>(&'a self, schema: &'a Value) -> &'a Value {
        match schema["$ref"].as_str() {
            Some(reference) => {
                self.root.pointer(reference.trim_start_matches('#')).expect("references resolve")
            }
            None => schema,
        }
    }

    /// What of `value` is not as the schema says: types, required fields, fields it does not know, bounds, choices.
    pub(crate) fn violations(&self, schema: &Value, value: &Value) -> Vec<String> {
        let schema = self.resolved(schema);
        let wrong = |what: &str| vec![format!("{value} is not {what}")];
        match schema["type"].as_str() {
            Some("integer") => {
                let Some(number) = value.as_i64() else { return wrong("an integer") };
                let is_within = schema["minimum"].as_i64().is_none_or(|minimum| number >= minimum)
                    && schema["maximum"].as_i64().is_none_or(|maximum| number <= maximum);
                if is_within { Vec::new() } else { wrong("within its bounds") }
            }
            Some("boolean") if !value.is_boolean() => wrong("a boolean"),
            Some("string") => match schema["enum"].as_array() {
                _ if !value.is_string() => wrong("a string"),
                Some(choices) if !choices.contains(value) => wrong("one of the choices"),
                _ => Vec::new(),
            },
            Some("array") => match value.as_array() {
                Some(items) => {
                    items.iter().flat_map(|item| self.violations(&schema["items"], item)).collect()
                }
                None => wrong("an array"),
            },
            Some("object") => match value.as_object() {
                Some(fields) => self.violations_of_object(schema, fields),
                None => wrong("an object"),
            },
            _ => Vec::new(),
        }
    }

    fn violations_of_object(&self, schema: &Value, fields: &Map<String, Value>) -> Vec<String> {
        let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let missing =
            required.filter(|name| !fields.contains_key(*name)).map(|name| format!("{name} is missing"));
        let known =
            |name: &str| schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
        let others = fields.iter().flat_map(|(name, value)| match known(name) {
            Some(schema) => self.violations(schema, value),
            None => vec![format!("{name} is unknown")],
        });
        missing.chain(others).collect()
    }

    /// A value the schema allows. Numbers are the smallest positive ones, choices the first.
    pub(crate) fn example(&self, schema: &Value, fullness: Fullness) -> Value {
        let schema = self.resolved(schema);
        match schema["type"].as_str() {
            Some("integer") => json!(schema["minimum"].as_i64().unwrap_or(1).max(1)),
            Some("boolean") => json!(true),
            Some("string") => schema["enum"].get(0).cloned().unwrap_or_else(|| json!("text")),
            Some("array") => json!([self.example(&schema["items"], fullness)]),
            Some("object") if schema.get("additionalProperties").is_some() => {
                json!({ "one": self.example(&schema["additionalProperties"], fullness) })
            }
            _ => {
                let is_required = |name: &String| {
                    schema["required"].as_array().is_some_and(|required| required.contains(&json!(name)))
                };
                let properties = schema["properties"].as_object().into_iter().flatten();
                let shown = properties.filter(|(name, _)| fullness == Fullness::Full || is_required(name));
                Value::Object(
                    shown.map(|(name, schema)| (name.clone(), self.example(schema, fullness))).collect(),
                )
            }
        }
    }
}

#[test]
fn violations_of_a_schema_are_found() {
    let description = Description::firecracker();
    let violations = |name: &str, value: Value| description.violations(description.schema(name), &value);
    assert_eq!(violations("BalloonUpdate", json!({ "amount_mib": 3 })), [""; 0]);
    assert_eq!(violations("BalloonUpdate", json!({})), ["amount_mib is missing"]);
    assert_eq!(violations("BalloonUpdate", json!({ "amount_mib": "3" })), ["\"3\" is not an integer"]);
    assert_eq!(violations("BalloonUpdate", json!({ "amount_mib": 3, "x": 1 })), ["x is unknown"]);
    assert_eq!(violations("Vm", json!({ "state": "Sleepy" })), ["\"Sleepy\" is not one of the choices"]);
    let below = violations("MemoryHotplugSizeUpdate", json!({ "requested_size_mib": -1 }));
    assert_eq!(below, ["-1 is not within its bounds"]);
    assert_eq!(description.violations_of_request("PATCH", "/balloon", None), ["PATCH /balloon needs a body"]);
    assert_eq!(description.violations_of_request("GET", "/nowhere", None), ["there is no GET /nowhere"]);
}
