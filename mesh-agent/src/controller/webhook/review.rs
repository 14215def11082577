//! What is answered when the API server asks whether it may take an object (`AdmissionReview`, `admission.k8s.io/v1`).
//!
//! Pure. Promises the words of the sources; that what is deleted, of no kind of the mesh, or a status is never refused; and that
//! an object which was wrong before may be changed in what does not matter (its finalizers, so that it can go). Tested in
//! `tests.rs`.

use kube::core::{
    DynamicObject, Status,
    admission::{
        AdmissionRequest, AdmissionResponse, AdmissionReview, META_API_VERSION_V1, META_KIND, Operation,
    },
    response::{StatusCause, StatusDetails, StatusSummary},
};

use crate::{
    source::kubernetes::read_proposed,
    state::{
        compile::{Settings, compile},
        resource::{Object, ObjectKey, Objects, Refused, Resource},
    },
};

/// Bytes of one warning, as Kubernetes bounds them.
const LONGEST_WARNING: usize = 256;
/// Warnings of one answer.
const MOST_WARNINGS: usize = 16;

/// What came of a question.
#[derive(Debug)]
pub(super) struct Judged {
    /// The answer, so far.
    pub response: AdmissionResponse,
    /// What is taken, of which there may be more to say.
    pub taken: Option<(ObjectKey, Resource)>,
}

impl Judged {
    /// The answer, with what else there is to say.
    pub fn answer(self, warnings: Vec<String>) -> AdmissionReview<DynamicObject> {
        let mut response = self.response;
        response.warnings.get_or_insert_default().extend(warnings);
        response.into_review()
    }
}

/// Answers a question by what is in it.
///
/// # Errors
/// It is not one; says why.
pub(super) fn judge(body: &[u8]) -> Result<Judged, String> {
    let review: AdmissionReview<DynamicObject> =
        serde_json::from_slice(body).map_err(|error| format!("the body is no AdmissionReview: {error}"))?;
    let types = &review.types;
    if types.api_version != META_API_VERSION_V1 || types.kind != META_KIND {
        return Err(format!(
            "the body is a {} of {}, and only {META_KIND} of {META_API_VERSION_V1} is answered",
            types.kind, types.api_version
        ));
    }
    let request: AdmissionRequest<DynamicObject> =
        review.try_into().map_err(|_| "the AdmissionReview has no request".to_owned())?;
    let mut response = AdmissionResponse::from(&request);
    let is_of_interest = request.sub_resource.as_ref().is_none_or(String::is_empty)
        && matches!(request.operation, Operation::Create | Operation::Update);
    if !is_of_interest {
        return Ok(Judged { response, taken: None });
    }
    let (object, before) = (request.object, request.old_object);
    let Some(object) = object else {
        return Err("the request of the AdmissionReview has no object, and is no DELETE".to_owned());
    };
    let may_go_on = before.is_some_and(|before| says_the_same(&before, &object));
    let taken = match read_proposed(object) {
        None => None,
        Some(Ok(taken)) => Some(taken),
        Some(Err((refused, more))) if may_go_on => {
            let all = std::iter::once(&refused).chain(&more);
            response.warnings = Some(all.map(|refused| bounded(&refused.problem("").said())).collect());
            None
        }
        Some(Err((refused, more))) => {
            response.allowed = false;
            response.result = refusal(&refused, &more);
            None
        }
    };
    Ok(Judged { response, taken })
}

/// Whether a change is of nothing that is read, or the object is on its way out.
fn says_the_same(before: &DynamicObject, after: &DynamicObject) -> bool {
    let spec = |object: &DynamicObject| object.data.get("spec").cloned();
    after.metadata.deletion_timestamp.is_some()
        || (spec(before) == spec(after) && before.metadata.annotations == after.metadata.annotations)
}

/// Each field that is wrong is a cause of its own, and all are in the message.
fn refusal(refused: &Refused, more: &[Refused]) -> Status {
    let all = || std::iter::once(refused).chain(more).map(|refused| refused.problem(""));
    let message = all().map(|problem| problem.said()).collect::<Vec<_>>().join("; ");
    let causes = all().map(|problem| StatusCause {
        reason: "FieldValueInvalid".to_owned(),
        message: problem.message,
        field: problem.field.unwrap_or_default(),
    });
    let (kind, name) =
        refused.key.as_ref().map(|key| (key.kind.to_string(), key.name.to_string())).unwrap_or_default();
    Status {
        status: Some(StatusSummary::Failure),
        code: 422,
        message,
        reason: "Invalid".to_owned(),
        details: Some(StatusDetails {
            name,
            group: String::new(),
            kind,
            uid: String::new(),
            causes: causes.collect(),
            retry_after_seconds: 0,
        }),
        ..Status::default()
    }
}

/// What is wrong with an object that is taken, and how it stands to those that are there.
pub(super) fn warnings(
    objects: &Objects,
    (key, resource): (ObjectKey, Resource),
    settings: &Settings,
) -> Vec<String> {
    let (mut objects, name) = (objects.clone(), key.to_string());
    objects.insert(key, Object { file: "".into(), resource }.into());
    let (_, problems) = compile(&objects, None, settings);
    let own = problems.iter().filter(|problem| problem.object.as_ref() == Some(&name));
    own.map(|problem| bounded(&problem.said())).take(MOST_WARNINGS).collect()
}

fn bounded(text: &str) -> String {
    if text.len() <= LONGEST_WARNING {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(LONGEST_WARNING - "…".len());
    format!("{}…", &text[..end])
}
