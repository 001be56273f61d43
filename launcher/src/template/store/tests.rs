use std::os::unix::fs::{FileExt, PermissionsExt};

use super::*;
use crate::template::memory;

const KEY: &str = "00112233445566778899aabbccddeeff";

fn key(text: &str) -> Key {
    text.parse().unwrap()
}

/// A store of `space` bytes, and the folder that holds it.
fn store(space: u64) -> (tempfile::TempDir, Store) {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(&root.path().join("templates"), space).unwrap();
    (root, store)
}

/// A template of a memory of 1 MiB with some pages.
fn make(store: &Store, text: &str) -> Result<Template, TemplateError> {
    let key = key(text);
    let right = store.try_lock(&key)?.unwrap();
    let draft = store.draft(&key, &right)?;
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(1 << 20).unwrap();
    memory.write_all_at(&[7; 4 * 4096], 8192).unwrap();
    let data = draft.data()?;
    let saved = memory::save(&memory, 1 << 20, &mut &data, &[]).unwrap();
    let manifest = Manifest {
        boot_id_at: vec![4096],
        ..Manifest::of_trial(text)
    };
    let content = Content {
        map: &saved.map,
        state: b"state of devices",
        manifest,
    };
    draft.finish(&data, content)
}

fn error_of(store: &Store) -> TemplateError {
    store.find(&key(KEY)).unwrap_err()
}

#[test]
fn what_was_made_is_found_and_whole() {
    let (root, store) = store(1 << 20);
    assert!(store.find(&key(KEY)).unwrap().is_none());
    make(&store, KEY).unwrap();
    let found = store.find(&key(KEY)).unwrap().unwrap();
    found.verify().unwrap();
    assert_eq!(
        (found.state.as_slice(), found.manifest.data_bytes),
        (b"state of devices".as_slice(), 4 * 4096)
    );
    for file in [MANIFEST, MAP, DATA, STATE] {
        let metadata = fs::metadata(root.path().join("templates").join(KEY).join(file)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600, "{file}");
    }
    assert!(store.remove(KEY).unwrap());
    assert!(!store.remove(KEY).unwrap());
    assert!(store.find(&key(KEY)).unwrap().is_none());
    found.verify().unwrap();
}

#[rstest::rstest]
#[case(MANIFEST)]
#[case(MAP)]
#[case(STATE)]
fn every_bit_of_what_is_small_is_checked(#[case] name: &str) {
    let (root, store) = store(1 << 20);
    make(&store, KEY).unwrap();
    let path = root.path().join("templates").join(KEY).join(name);
    let whole = fs::read(&path).unwrap();
    for place in (0..whole.len()).step_by(whole.len() / 16 + 1) {
        let mut changed = whole.clone();
        changed[place] ^= 1;
        // White space of JSON may be any.
        if whole[place].is_ascii_whitespace() && changed[place].is_ascii_whitespace() {
            continue;
        }
        fs::write(&path, changed).unwrap();
        assert!(
            matches!(error_of(&store), TemplateError::Damaged { .. }),
            "byte {place} of {name}"
        );
    }
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert!(
        matches!(error_of(&store), TemplateError::Damaged { .. }),
        "{name} cut short"
    );
    fs::remove_file(&path).unwrap();
    assert!(
        matches!(error_of(&store), TemplateError::Damaged { .. }),
        "{name} removed"
    );
}

#[test]
fn memory_that_is_cut_short_or_changed_is_not_whole() {
    let (root, store) = store(1 << 20);
    make(&store, KEY).unwrap();
    let path = root.path().join("templates").join(KEY).join(DATA);
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[6], 5000).unwrap();
    let error = store.find(&key(KEY)).unwrap().unwrap().verify().unwrap_err();
    assert!(matches!(error, TemplateError::Damaged { .. }), "{error}");
    file.set_len(4096).unwrap();
    assert!(
        error_of(&store)
            .to_string()
            .contains("4096 bytes where 16384 were saved")
    );
}

#[test]
fn a_template_under_another_name_is_none() {
    let (root, store) = store(1 << 20);
    make(&store, KEY).unwrap();
    let folder = root.path().join("templates");
    let other = "ff112233445566778899aabbccddeeff";
    fs::rename(folder.join(KEY), folder.join(other)).unwrap();
    let error = store.find(&key(other)).unwrap_err();
    assert!(matches!(error, TemplateError::Damaged { .. }), "{error}");
}

#[test]
fn what_others_can_change_is_not_used() {
    let (root, store) = store(1 << 20);
    make(&store, KEY).unwrap();
    let folder = root.path().join("templates");
    for path in [folder.join(KEY), folder.join(KEY).join(STATE)] {
        let mode = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o740)).unwrap();
        assert!(
            matches!(error_of(&store), TemplateError::NotOurs { .. }),
            "{}",
            path.display()
        );
        fs::set_permissions(&path, mode).unwrap();
    }
    let state = folder.join(KEY).join(STATE);
    fs::rename(&state, folder.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(folder.join("elsewhere"), &state).unwrap();
    assert!(
        matches!(error_of(&store), TemplateError::Io { .. }),
        "a link is followed"
    );
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(Store::open(&folder, 1), Err(TemplateError::NotOurs { .. })));
}

#[test]
fn the_one_that_was_not_used_for_longest_makes_room() {
    let size = {
        let (_root, store) = store(1 << 20);
        let made = make(&store, KEY).unwrap();
        bytes_of(&made.folder)
    };
    let (root, store) = store(size * 5 / 2);
    let keys = ["a", "b", "c"].map(|first| first.to_owned() + &KEY[1..]);
    make(&store, &keys[0]).unwrap();
    make(&store, &keys[1]).unwrap();
    let past = |text: &str, seconds| {
        let folder = File::open(root.path().join("templates").join(text)).unwrap();
        folder
            .set_modified(SystemTime::now() - std::time::Duration::from_secs(seconds))
            .unwrap();
    };
    past(&keys[0], 100);
    past(&keys[1], 200);
    make(&store, &keys[2]).unwrap();
    let left: Vec<_> = store.entries().unwrap().into_iter().map(|entry| entry.key).collect();
    assert_eq!(left, [keys[2].clone(), keys[0].clone()]);

    let (_root, small) = self::store(4096);
    assert!(matches!(make(&small, KEY), Err(TemplateError::NoRoom(_))));
    assert_eq!(small.sweep().unwrap(), 0, "what was refused is left behind");
}

#[test]
fn an_attempt_that_died_is_swept_unless_somebody_is_at_it() {
    let (_root, store) = store(1 << 20);
    let right = store.try_lock(&key(KEY)).unwrap().unwrap();
    let draft = store.draft(&key(KEY), &right).unwrap();
    let path = draft.path.clone();
    std::mem::forget(draft);
    assert!(store.try_lock(&key(KEY)).unwrap().is_none());
    store.sweep().unwrap();
    assert!(path.exists());
    drop(right);
    store.sweep().unwrap();
    assert!(!path.exists());
    assert_eq!(store.entries().unwrap().len(), 0);
}

#[test]
fn three_failures_in_a_row_are_enough_until_somebody_forgives() {
    let (_root, store) = store(1 << 20);
    let key = key(KEY);
    for _ in 0..2 {
        store.note_use(&key, Some("the guest is silent".to_owned()));
    }
    assert_eq!(store.uses(KEY).left_alone(), None);
    store.note_use(&key, None);
    for _ in 0..3 {
        store.note_use(&key, Some("the guest is silent".to_owned()));
    }
    let uses = store.uses(KEY);
    assert_eq!((uses.clones, uses.failures, uses.failures_in_a_row), (1, 5, 3));
    assert!(uses.left_alone().unwrap().contains("the guest is silent"));
    store.forgive(&key);
    assert_eq!(store.uses(KEY).left_alone(), None);
}
