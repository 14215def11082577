//! What a verified token says.
//!
//! Only [`super::verify`] makes these: what is in them has been signed by whom a rule names.

use http::HeaderValue;
use serde_json::{Map, Value};

/// The claims of a verified token.
#[derive(Debug, Clone)]
pub struct Claims {
    payload: Map<String, Value>,
    /// Claims whose text is a list of words.
    spaced: Box<[Box<str>]>,
}

impl Claims {
    pub(super) fn new(payload: Map<String, Value>, spaced: &[Box<str>]) -> Self {
        Self { payload, spaced: spaced.into() }
    }

    fn text(&self, name: &str) -> Option<&str> {
        self.payload.get(name).and_then(Value::as_str).filter(|text| !text.is_empty())
    }

    /// Issuer and subject: who asks. `None` where the token names no subject.
    pub fn principal(&self) -> Option<[&str; 3]> {
        Some([self.text("iss")?, "/", self.text("sub")?])
    }

    /// `azp`: to whom it was given.
    pub fn presenter(&self) -> Option<&str> {
        self.text("azp")
    }

    /// `aud`: for whom it is.
    pub fn audiences(&self) -> impl Iterator<Item = &str> {
        texts(self.payload.get("aud"))
    }

    /// Whether one of the values of a claim is such: a text has one, a list as many as it has texts in it, a list of words
    /// its words. Numbers and others have none (Istio).
    pub fn any(&self, path: &[Box<str>], is: impl Fn(&str) -> bool) -> bool {
        let value = self.at(path);
        if let ([name], Some(Value::String(words))) = (path, value)
            && self.spaced.contains(name)
        {
            return words.split(' ').filter(|word| !word.is_empty()).any(is);
        }
        texts(value).any(is)
    }

    fn at(&self, path: &[Box<str>]) -> Option<&Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.payload.get(&**first)?, |value, name| value.as_object()?.get(&**name))
    }

    /// A claim as a header: texts, whole numbers, `true` and `false` can be one (Istio).
    pub(super) fn header(&self, path: &[Box<str>]) -> Option<HeaderValue> {
        match self.at(path)? {
            Value::String(text) => {
                HeaderValue::from_bytes(text.as_bytes()).ok().filter(|text| !text.is_empty())
            }
            Value::Number(number) if !number.is_f64() => HeaderValue::try_from(number.to_string()).ok(),
            Value::Bool(yes) => Some(HeaderValue::from_static(if *yes { "true" } else { "false" })),
            _ => None,
        }
    }
}

fn texts(value: Option<&Value>) -> impl Iterator<Item = &str> {
    let one = value.and_then(Value::as_str);
    let several = value.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    one.into_iter().chain(several)
}
