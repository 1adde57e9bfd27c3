package main

import (
	"encoding/json"
	"net/http"

	"github.com/go-chi/chi/v5"

	"github.com/pgxtenant/pgxtenant"
)

// chiRouter uses the middleware as it is: chi's middleware is net/http's.
func chiRouter(s *service) http.Handler {
	router := chi.NewRouter()
	router.Get("/healthz", func(http.ResponseWriter, *http.Request) {})
	router.Group(func(router chi.Router) {
		router.Use(authenticate, s.tenants)
		router.Get("/notes", func(w http.ResponseWriter, r *http.Request) {
			all, err := s.list(r.Context())
			if err != nil {
				pgxtenant.Refuse(w, r, err)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(all)
		})
		router.Post("/notes", func(w http.ResponseWriter, r *http.Request) {
			if err := s.add(r.Context(), r.FormValue("body")); err != nil {
				pgxtenant.Refuse(w, r, err)
				return
			}
			w.WriteHeader(http.StatusCreated)
		})
	})
	return router
}
