//! Files with one resource each, outside of an agent's directory: read to the end, so that all errors are listed at once. What is in the
//! resource is its own reader's.

use std::{path::Path, sync::Arc};

use super::{
    document::{self, Node, Pair, Value},
    finding::{ConfigErrors, Finding, Origin, Report, about_file},
    read_file, resource_name, text_of,
};

/// Reads the resource of this kind (of marline.io/v1alpha1) in `file`: the only document there.
pub(super) fn read<T>(
    file: &Path,
    kind: &str,
    read: impl Fn(&Origin, &[Pair], &mut Report) -> Option<T>,
) -> Result<(T, Vec<Finding>), ConfigErrors> {
    let mut report = Report::default();
    let mut made = None;
    match documents(file) {
        Err(finding) => report.errors.push(*finding),
        Ok(documents) => match documents.as_slice() {
            [node] => {
                if let Some(document) = checked(file, node, kind, &mut report) {
                    let origin =
                        Origin { file: file.into(), line: node.line, resource: resource_name(kind, document).into() };
                    made = read(&origin, document, &mut report);
                }
            }
            all => {
                let message = format!("holds {} documents, and must hold one, of kind {kind}", all.len());
                let hint = "put everything else into files of its own";
                report.errors.push(about_file(file, all.get(1).map(|node| node.line), message, hint));
            }
        },
    }
    match made {
        Some(made) if report.errors.is_empty() => Ok((made, report.into_warnings())),
        _ => Err(report.into_errors()),
    }
}

fn documents(file: &Path) -> Result<Vec<Node>, Box<Finding>> {
    let about = |line, message, hint| Box::new(about_file(file, line, message, hint));
    let bytes = read_file(file)
        .map_err(|error| about(None, format!("cannot be read: {error}"), "give a file that is there and readable"))?;
    let text = String::from_utf8(bytes).map_err(|_| about(None, "is not UTF-8 text".to_owned(), "save it as UTF-8"))?;
    let (parts, error) = document::parse(&text, |nodes: &mut Vec<Node>, node| nodes.push(node));
    match error {
        Some(error) => Err(about(error.line, format!("is not valid YAML: {}", error.message), "correct it")),
        None => Ok(parts.into_iter().flatten().collect()),
    }
}

fn checked<'a>(file: &Path, node: &'a Node, kind: &str, report: &mut Report) -> Option<&'a [Pair]> {
    let hint = format!("write apiVersion: marline.io/v1alpha1, kind: {kind}, and spec");
    let Value::Map(document) = &node.value else {
        let message = format!("expected a resource, found {}", node.value.kind());
        report.errors.push(about_file(file, Some(node.line), message, &hint));
        return None;
    };
    let found = (text_of(document, "apiVersion"), text_of(document, "kind"));
    if found == ("marline.io/v1alpha1", kind) {
        return Some(document);
    }
    let origin = Origin { file: Arc::from(file), line: node.line, resource: "document".into() };
    let message = format!("expected kind {kind} of marline.io/v1alpha1, found {:?} of {:?}", found.1, found.0);
    report.errors.push(origin.finding("kind", node.line, message, hint));
    None
}
