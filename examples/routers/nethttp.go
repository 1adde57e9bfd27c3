package main

import (
	"encoding/json"
	"net/http"

	"github.com/pgxtenant/pgxtenant"
)

func netHTTP(s *service) http.Handler {
	notes := http.NewServeMux()
	notes.HandleFunc("GET /notes", func(w http.ResponseWriter, r *http.Request) {
		all, err := s.list(r.Context())
		if err != nil {
			pgxtenant.Refuse(w, r, err)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(all)
	})
	notes.HandleFunc("POST /notes", func(w http.ResponseWriter, r *http.Request) {
		if err := s.add(r.Context(), r.FormValue("body")); err != nil {
			pgxtenant.Refuse(w, r, err)
			return
		}
		w.WriteHeader(http.StatusCreated)
	})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.Handle("/notes", authenticate(s.tenants(notes)))
	return mux
}
