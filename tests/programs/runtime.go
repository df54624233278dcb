// An HTTP server and its client by Go's own library: a goroutine for each connection, keep-alive, everything through the runtime's
// poller (edge-triggered epoll, accept4 without blocking, connect without blocking).
//
//	runtime serve PORT                              echoes bodies; says who asked
//	runtime call URL CONNECTIONS REQUESTS SIZE      so many requests one after the other on each of so many connections at once
package main

import (
	"bytes"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
)

func main() {
	var err error
	if len(os.Args) == 3 && os.Args[1] == "serve" {
		err = serve(os.Args[2])
	} else if len(os.Args) == 6 && os.Args[1] == "call" {
		err = call(os.Args[2], number(os.Args[3]), number(os.Args[4]), number(os.Args[5]))
	} else {
		err = fmt.Errorf("see the head of runtime.go")
	}
	if err != nil {
		fmt.Println("WRONG:", err)
		os.Exit(1)
	}
}

func number(word string) int {
	value, err := strconv.Atoi(word)
	if err != nil {
		fmt.Println("WRONG:", err)
		os.Exit(1)
	}
	return value
}

func serve(port string) error {
	echo := func(answer http.ResponseWriter, request *http.Request) {
		body, err := io.ReadAll(request.Body)
		if err != nil {
			fmt.Println("WRONG:", err)
			return
		}
		answer.Header().Set("Content-Length", strconv.Itoa(len(body)))
		answer.Write(body)
	}
	server := http.Server{
		Addr:    ":" + port,
		Handler: http.HandlerFunc(echo),
		ConnState: func(connection net.Conn, state http.ConnState) {
			if state == http.StateNew {
				fmt.Println("peer", connection.RemoteAddr())
			}
		},
	}
	return server.ListenAndServe()
}

func call(url string, connections, requests, size int) error {
	var opened atomic.Int32
	var group sync.WaitGroup
	failures := make(chan error, connections)
	for index := range connections {
		group.Add(1)
		go func() {
			defer group.Done()
			// A transport of its own: one connection, kept alive between requests.
			transport := &http.Transport{MaxConnsPerHost: 1}
			defer transport.CloseIdleConnections()
			dialer := net.Dialer{}
			transport.DialContext = dialer.DialContext
			client := http.Client{Transport: transport}
			for turn := range requests {
				if err := exchange(&client, url, int64(index*requests+turn), size); err != nil {
					failures <- err
					return
				}
			}
			opened.Add(1)
		}()
	}
	group.Wait()
	close(failures)
	for err := range failures {
		return err
	}
	fmt.Println("exact:", opened.Load(), "connections")
	return nil
}

func exchange(client *http.Client, url string, seed int64, size int) error {
	sent := make([]byte, size)
	rand.New(rand.NewSource(seed)).Read(sent)
	response, err := client.Post(url, "application/octet-stream", bytes.NewReader(sent))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, sent) {
		return fmt.Errorf("%d bytes came back for %d, or others", len(got), len(sent))
	}
	return nil
}
