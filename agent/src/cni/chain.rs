//! Puts the plugin into the text of a CNI configuration, and takes it out: nothing else of the text is touched, so that what is taken out leaves
//! the text as it was, to the byte. Pure.

use std::ops::Range;

use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use super::{NAME, protocol::VERSIONS};

#[derive(Deserialize)]
struct List<'a> {
    #[serde(borrow)]
    plugins: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct Single {
    #[serde(rename = "cniVersion")]
    version: Option<String>,
    name: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    cni_version: Option<String>,
    #[serde(default)]
    cni_versions: Vec<String>,
}

/// The plugin's own entry.
pub fn entry(socket: &str, timeout_seconds: u64) -> String {
    json!({"type": NAME, "socket": socket, "timeoutSeconds": timeout_seconds}).to_string()
}

/// Whether a list ends with the plugin.
pub fn ends_with_it(text: &str) -> Result<bool, String> {
    Ok(plugins(text)?.last().is_some_and(|last| is_ours(text, last)))
}

/// Whether the plugin speaks the configuration's version. In one of another version every call for a pod of the node would fail.
pub fn spoken(text: &str) -> Result<(), String> {
    let said: Versions = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let known = |version: &String| VERSIONS.contains(&version.as_str());
    let what = match &said.cni_version {
        Some(version) if known(version) => return Ok(()),
        // Runtimes choose among these.
        None if said.cni_versions.iter().any(known) => return Ok(()),
        Some(version) => format!("its cniVersion is {version:?}"),
        None if said.cni_versions.is_empty() => "it has no cniVersion, which is 0.1.0".to_owned(),
        None => format!("its cniVersions are {}", said.cni_versions.join(", ")),
    };
    Err(format!(
        "{what}, and {NAME} speaks {}: in its chain no pod of this node could start; set one of these cniVersions there, where the CNI \
         that writes the file is configured",
        VERSIONS.join(", ")
    ))
}

/// A list with this entry at its end and nowhere else. `None` where it is so already.
pub fn add(text: &str, entry: &str) -> Result<Option<String>, String> {
    let all = plugins(text)?;
    let ours: Vec<_> = all.iter().filter(|span| is_ours(text, span)).collect();
    if let [only] = ours.as_slice()
        && all.last() == Some(*only)
        && value(text, only) == serde_json::from_str(entry).ok()
    {
        return Ok(None);
    }
    let without = remove(text)?.unwrap_or_else(|| text.to_owned());
    let Some(last) = plugins(&without)?.pop() else {
        return Err("it lists no plugin that Marline's could follow".into());
    };
    let (before, after) = (slice(&without, 0..last.end), slice(&without, last.end..without.len()));
    // Beside the last one as that is beside the one before it.
    let head = slice(&without, 0..last.start);
    let space = slice(head, head.trim_end().len()..head.len());
    Ok(Some(format!("{before},{space}{entry}{after}")))
}

/// The list without the plugin. `None` where it is not in there.
pub fn remove(text: &str) -> Result<Option<String>, String> {
    let (mut now, mut changed) = (text.to_owned(), false);
    loop {
        let all = plugins(&now)?;
        let Some(at) = all.iter().position(|span| is_ours(&now, span)) else { return Ok(changed.then_some(now)) };
        let Some(ours) = all.get(at) else { return Ok(changed.then_some(now)) };
        let previous = at.checked_sub(1).and_then(|at| all.get(at));
        let cut = match (previous, all.get(at + 1)) {
            (Some(previous), _) => previous.end..ours.end,
            (None, Some(next)) => ours.start..next.start,
            (None, None) => ours.clone(),
        };
        now = format!("{}{}", slice(&now, 0..cut.start), slice(&now, cut.end..now.len()));
        changed = true;
    }
}

/// A list of a configuration with one plugin, and the entry after it. What runtimes make of the one they find so, too.
pub fn wrap(text: &str, entry: &str) -> Result<String, String> {
    let single: Single = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if single.kind.is_none_or(|kind| kind.is_empty()) {
        return Err("it is no configuration of a plugin: it has no type".into());
    }
    let name = single.name.filter(|name| !name.is_empty()).ok_or("it has no name")?;
    let version = single.version.map(|version| format!("\"cniVersion\": {},\n  ", json!(version))).unwrap_or_default();
    Ok(format!("{{\n  {version}\"name\": {},\n  \"plugins\": [\n{},\n{entry}\n  ]\n}}\n", json!(name), text.trim()))
}

/// Where each plugin stands in the text.
fn plugins(text: &str) -> Result<Vec<Range<usize>>, String> {
    let list: List<'_> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let start = text.as_ptr().addr();
    let span = |raw: &&RawValue| {
        let begins = raw.get().as_ptr().addr().checked_sub(start)?;
        Some(begins..begins + raw.get().len())
    };
    list.plugins.iter().map(span).collect::<Option<_>>().ok_or_else(|| "its plugins cannot be told apart".to_owned())
}

fn is_ours(text: &str, span: &Range<usize>) -> bool {
    serde_json::from_str::<Named>(slice(text, span.clone())).is_ok_and(|named| named.kind == NAME)
}

fn value(text: &str, span: &Range<usize>) -> Option<Value> {
    serde_json::from_str(slice(text, span.clone())).ok()
}

fn slice(text: &str, span: Range<usize>) -> &str {
    text.get(span).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CALICO: &str = include_str!("testdata/10-calico.conflist");

    fn ours() -> String {
        entry("/run/marline/cni.sock", 30)
    }

    #[test]
    fn the_plugin_goes_last_once_and_comes_out_without_a_trace() {
        let with = add(CALICO, &ours()).unwrap().unwrap();
        assert!(ends_with_it(&with).unwrap() && !ends_with_it(CALICO).unwrap());
        assert_eq!(add(&with, &ours()).unwrap(), None);
        assert_eq!(remove(&with).unwrap().as_deref(), Some(CALICO));
        assert_eq!(remove(CALICO).unwrap(), None);
        let moved = add(&with, &entry("/elsewhere", 5)).unwrap().unwrap();
        assert_eq!(moved.matches(NAME).count(), 1);
        assert_eq!(remove(&moved).unwrap().as_deref(), Some(CALICO));
    }

    #[test]
    fn one_that_is_not_the_last_is_moved_there() {
        let text = format!("{{\"name\": \"n\", \"plugins\": [{}, {{\"type\": \"ptp\"}}]}}", ours());
        let with = add(&text, &ours()).unwrap().unwrap();
        let read: Value = serde_json::from_str(&with).unwrap();
        assert_eq!(read["plugins"][0]["type"], "ptp");
        assert_eq!(read["plugins"][1]["type"], NAME);
        assert_eq!(read["plugins"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn what_is_no_list_is_told_and_not_touched() {
        for text in ["", "{", "[]", "{\"plugins\": 3}", "{\"plugins\": []}", "{\"type\": \"bridge\"}"] {
            assert!(add(text, &ours()).is_err(), "{text}");
        }
        assert!(wrap("{\"name\": \"x\"}", &ours()).is_err());
        assert!(wrap("{\"type\": \"bridge\"}", &ours()).is_err());
    }

    #[test]
    fn a_single_plugin_becomes_a_list_of_it_with_all_its_fields() {
        let text = "{ \"cniVersion\": \"0.3.1\", \"name\": \"mynet\", \"type\": \"bridge\", \"isGateway\": true, \"zz\": [1, null] }\n";
        let read: Value = serde_json::from_str(&wrap(text, &ours()).unwrap()).unwrap();
        assert_eq!((&read["cniVersion"], &read["name"]), (&json!("0.3.1"), &json!("mynet")));
        assert_eq!(read["plugins"][0], serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(read["plugins"][1]["type"], NAME);
    }

    #[test]
    fn a_version_that_the_plugin_does_not_speak_is_named_with_those_that_it_does() {
        for said in [
            "\"cniVersion\": \"0.3.0\"",
            "\"cniVersion\": \"1.1.0\"",
            "\"cniVersion\": \"1.0.0\", \"cniVersions\": [\"1.2.0\"]",
            "\"cniVersions\": [\"0.4.0\", \"1.0.0\"]",
        ] {
            assert_eq!(spoken(&format!("{{{said}, \"plugins\": []}}")), Ok(()), "{said}");
        }
        for (said, named) in [
            ("\"cniVersion\": \"0.2.0\"", "0.2.0"),
            ("\"cniVersion\": \"1.2.0\"", "1.2.0"),
            ("\"cniVersion\": \"\"", "\"\""),
            ("\"cniVersions\": [\"1.2.0\"]", "1.2.0"),
            ("\"name\": \"n\"", "0.1.0"),
        ] {
            let why = spoken(&format!("{{{said}, \"plugins\": []}}")).unwrap_err();
            assert!(why.contains(named) && why.contains("0.3.1") && why.contains("set one"), "{said}: {why}");
        }
        assert!(spoken("{").is_err());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ -~äß\\n\\t\"\\\\]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map("[a-z\"{}\\[\\], ]{1,8}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn plugin() -> impl Strategy<Value = Value> {
        ("[a-z]{1,8}", any_json()).prop_map(|(kind, more)| json!({"type": kind, "more": more}))
    }

    proptest! {
        #[test]
        fn any_list_keeps_all_that_it_has_and_gets_it_back_to_the_byte(
            plugins in prop::collection::vec(plugin(), 1..5),
            more in any_json(),
            pretty: bool,
            space in "[ \\n\\t]{0,4}",
        ) {
            let value = json!({"cniVersion": "1.0.0", "aa": more, "name": "n", "plugins": plugins, "zz": more});
            let text = if pretty { serde_json::to_string_pretty(&value).unwrap() } else { value.to_string() };
            let text = format!("{space}{text}{space}");
            let with = add(&text, &ours()).unwrap().unwrap();
            let mut read: Value = serde_json::from_str(&with).unwrap();
            let last = read["plugins"].as_array_mut().unwrap().pop().unwrap();
            prop_assert_eq!(last, serde_json::from_str::<Value>(&ours()).unwrap());
            prop_assert_eq!(read, value);
            prop_assert_eq!(remove(&with).unwrap(), Some(text));
            prop_assert_eq!(add(&with, &ours()).unwrap(), None);
        }

        #[test]
        fn any_text_is_refused_or_done_right(text in "[\\[\\]{}\",:a-z0-9 ]{0,60}") {
            if let Ok(Some(with)) = add(&text, &ours()) {
                prop_assert!(ends_with_it(&with).unwrap());
            }
            let _ = (remove(&text), wrap(&text, &ours()), ends_with_it(&text));
        }
    }
}
