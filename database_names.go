package pgxtenant

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	passingPrefix = "pgxtenant_new_"
	retiredPrefix = "pgxtenant_old_"
)

// passingName is the name of a database that is being made; no two databases share one.
func passingName(name string) string { return passingPrefix + nameHash(name) }

// retiredName carries the time in a form that does not vary in length.
func retiredName(name string, at time.Time) string {
	return fmt.Sprintf("%s%013d_%s", retiredPrefix, at.UnixMilli(), nameHash(name))
}

func retiredAt(name string) time.Time {
	rest, ok := strings.CutPrefix(name, retiredPrefix)
	if !ok {
		return time.Time{}
	}
	digits, _, _ := strings.Cut(rest, "_")
	ms, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// nameHash is 160 bits of name's SHA-256, in 32 characters.
func nameHash(name string) string {
	sum := sha256.Sum256([]byte(name))
	return strings.ToLower(schemaHash.EncodeToString(sum[:20]))
}

// validName refuses names that the server would cut off or could not store.
func validName(name string) error {
	switch {
	case name == "":
		return errors.New("it is empty")
	case len(name) > maxNameLen:
		return fmt.Errorf("it has %d bytes, more than the server keeps (%d)", len(name), maxNameLen)
	case strings.IndexByte(name, 0) >= 0 || !utf8.ValidString(name):
		return errors.New("it has a NUL byte or is not UTF-8")
	}
	return nil
}

// settingIdent writes a setting's name where SQL wants one.
func settingIdent(setting string) string { return ident(strings.Split(setting, ".")...) }
