//! Real results of real plugins, and all that may be wrong with a call.

use proptest::prelude::*;

use super::*;

/// As they are printed on nodes: bridge with host-local, Calico (no interface index, /32), Cilium (the host's end first), a dual-stack
/// ptp of CNI 1.0, and one whose plugin counts from nowhere.
const BRIDGE: &str = include_str!("../testdata/result-bridge.json");
const CALICO: &str = include_str!("../testdata/result-calico.json");
const CILIUM: &str = include_str!("../testdata/result-cilium.json");
const PTP: &str = include_str!("../testdata/result-ptp-dual.json");

fn raw(text: &str) -> Box<RawValue> {
    RawValue::from_string(text.trim().to_owned()).unwrap()
}

fn found(text: &str) -> Vec<String> {
    addresses(&raw(text), "eth0").unwrap().iter().map(ToString::to_string).collect()
}

#[test]
fn the_pods_own_addresses_are_found_in_what_each_cni_prints() {
    assert_eq!(found(BRIDGE), ["10.244.1.7"]);
    assert_eq!(found(CALICO), ["192.168.219.71", "fd00:10:244:db40::7"]);
    assert_eq!(found(CILIUM), ["10.0.1.187", "fd00::1bb"]);
    assert_eq!(found(PTP), ["10.1.0.5", "fd01::5"]);
    // Of an interface with another name in the sandbox only where its own has none.
    let other = r#"{"interfaces": [{"name": "net1", "sandbox": "/run/netns/x"}], "ips": [{"address": "10.9.9.9/24", "interface": 0}]}"#;
    assert_eq!(found(other), ["10.9.9.9"]);
    assert_eq!(found("{}"), Vec::<String>::new());
}

#[test]
fn a_result_that_makes_no_sense_is_refused() {
    for text in [
        "3",
        r#"{"ips": [{"address": "10.0.0.1/24", "interface": 3}]}"#,
        r#"{"ips": [{"address": "nowhere"}]}"#,
        r#"{"ips": [{"address": "127.0.0.1/8"}]}"#,
        r#"{"ips": [{"address": "0.0.0.0/0"}]}"#,
    ] {
        assert!(addresses(&raw(text), "eth0").is_err(), "{text}");
    }
}

#[test]
fn versions_are_spoken_or_told_to_be_unknown() {
    let of = |version: &str| Configuration { cni_version: Some(version.into()), ..Configuration::default() };
    for version in VERSIONS {
        assert_eq!(of(version).version(Verb::Add).unwrap(), version);
    }
    for version in ["0.1.0", "0.2.0", "1.2.0", "nonsense", ""] {
        assert_eq!(of(version).version(Verb::Add).unwrap_err().code(), 1, "{version}");
    }
    assert_eq!(Configuration::default().version(Verb::Add).unwrap_err().code(), 1);
    for version in ["0.3.0", "0.3.1"] {
        assert_eq!(of(version).version(Verb::Check).unwrap_err().code(), 4);
    }
    assert_eq!(of("1.0.0").version(Verb::Gc).unwrap_err().code(), 4);
    assert!(of("0.4.0").version(Verb::Check).is_ok() && of("1.1.0").version(Verb::Status).is_ok());
}

fn container(verb: Verb, pairs: &[(&str, &str)]) -> Result<Container, ProtocolError> {
    let find = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
    Container::read(verb, &find)
}

const WELL: [(&str, &str); 4] = [
    ("CNI_CONTAINERID", "0a1b2c"),
    ("CNI_NETNS", "/var/run/netns/cni-1"),
    ("CNI_IFNAME", "eth0"),
    (
        "CNI_ARGS",
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=0a1b2c;K8S_POD_UID=u-1",
    ),
];

#[test]
fn a_container_is_read_from_the_environment_of_containerd() {
    let read = container(Verb::Add, &WELL).unwrap();
    assert_eq!((read.id.as_str(), read.interface.as_str()), ("0a1b2c", "eth0"));
    let pod = read.pod().unwrap();
    assert_eq!((pod.namespace.as_str(), pod.name.as_str(), pod.uid.as_deref()), ("shop", "web-0", Some("u-1")));
}

#[test]
fn each_variable_that_is_missing_or_wrong_is_named() {
    let with = |name: &str, value: &str| {
        let pairs: Vec<_> = WELL.iter().map(|(key, old)| (*key, if *key == name { value } else { *old })).collect();
        let error = container(Verb::Add, &pairs).and_then(|read| read.pod()).unwrap_err();
        assert_eq!(error.code(), 4, "{name}={value}: {error}");
        assert!(error.to_string().contains(name), "{error}");
    };
    for (name, value) in [
        ("CNI_CONTAINERID", ""),
        ("CNI_CONTAINERID", "../x"),
        ("CNI_CONTAINERID", "-x"),
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "relative"),
        ("CNI_IFNAME", ""),
        ("CNI_IFNAME", "sixteen-letters-"),
        ("CNI_IFNAME", "a/b"),
        ("CNI_IFNAME", ".."),
        ("CNI_ARGS", ""),
        ("CNI_ARGS", "K8S_POD_NAME=x"),
        ("CNI_ARGS", "K8S_POD_NAMESPACE=a/b;K8S_POD_NAME=x"),
    ] {
        with(name, value);
    }
    // A container that is gone has no namespace any more.
    assert!(container(Verb::Del, &[WELL[0], WELL[2]]).is_ok());
}

#[test]
fn errors_have_the_codes_of_the_specification() {
    let said: serde_json::Value =
        serde_json::from_str(&ProtocolError::Later("not yet".into()).json("1.0.0", "wait")).unwrap();
    assert_eq!(said, json!({"cniVersion": "1.0.0", "code": 11, "msg": "not yet", "details": "wait"}));
}

/// libcni sends both names, and a list that was never made as `null`.
#[test]
fn what_is_valid_at_gc_is_read_under_either_name_and_under_both() {
    let valid = |fields: &str| {
        let text = format!("{{\"cniVersion\": \"1.1.0\", \"name\": \"pods\"{fields}}}");
        let read = Configuration::read(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
        read.valid().map(|valid| valid.iter().map(|one| one.container.clone()).collect::<Vec<_>>())
    };
    let (long, short, one) =
        ("cni.dev/valid-attachments", "cni.dev/attachments", "[{\"containerID\": \"c1\", \"ifname\": \"eth0\"}]");
    let field = |name: &str, value: &str| format!(", \"{name}\": {value}");
    for name in [long, short] {
        assert_eq!(valid(&field(name, one)).unwrap(), ["c1"], "{name}");
        assert!(
            valid(&field(name, "[]")).unwrap().is_empty() && valid(&field(name, "null")).unwrap().is_empty(),
            "{name}"
        );
    }
    assert_eq!(valid(&(field(long, one) + &field(short, one))).unwrap(), ["c1"]);
    assert_eq!(valid(&(field(short, "[]") + &field(long, one))).unwrap(), ["c1"]);
    assert!(valid(&(field(long, "null") + &field(short, "null"))).unwrap().is_empty());
    let missing = valid("").unwrap_err();
    assert!(missing.code() == 7 && missing.to_string().contains(long), "{missing}");
}

proptest! {
    #[test]
    fn whatever_is_on_standard_input_is_read_or_refused(text in "[\\[\\]{}\",:a-zA-Z0-9./ -]{0,80}") {
        if let Ok(read) = Configuration::read(&text) {
            let _ = read.version(Verb::Add);
        }
        if let Ok(raw) = RawValue::from_string(text.clone()) {
            let _ = addresses(&raw, "eth0");
        }
        let _ = container(Verb::Add, &[("CNI_CONTAINERID", &text), WELL[1], ("CNI_IFNAME", &text), ("CNI_ARGS", &text)])
            .and_then(|read| read.pod());
    }
}
