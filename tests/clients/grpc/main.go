// Command lab-grpc-client is the gRPC library most services of the world are called with, as a client of the lab: one
// Check and one Watch of the health service, each with its deadline, told as one object of JSON.
//
// It exits with 0 whatever the statuses were: they are the answer. Only what is no answer at all is an error.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// podHeader is the header by which the lab's apps name their pod.
const podHeader = "x-lab-pod"

// A call, as the library told its end.
type call struct {
	// The status code's name, for example OK or DeadlineExceeded.
	Code string `json:"code"`
	// The status message.
	Message string `json:"message"`
	// The messages that came before the end.
	Messages []string `json:"messages"`
	// Which pod answered, by the response's headers.
	Pod string `json:"pod"`
	// How long the call took.
	Milliseconds int64 `json:"ms"`
}

func main() {
	address := flag.String("address", "", "the server, as HOST:PORT")
	service := flag.String("service", "", "the service to ask the health of")
	deadline := flag.Duration("deadline", 20*time.Second, "the deadline of each call")
	authority := flag.String("authority", "", "the :authority, if not the address")
	flag.Parse()

	answers, err := ask(*address, *authority, *service, *deadline)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(answers)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func ask(address, authority, service string, deadline time.Duration) (map[string]call, error) {
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if authority != "" {
		options = append(options, grpc.WithAuthority(authority))
	}
	connection, err := grpc.NewClient("passthrough:///"+address, options...)
	if err != nil {
		return nil, err
	}
	defer connection.Close()
	client := grpc_health_v1.NewHealthClient(connection)
	request := &grpc_health_v1.HealthCheckRequest{Service: service}
	return map[string]call{
		"check": within(deadline, func(ctx context.Context) call { return check(ctx, client, request) }),
		"watch": within(deadline, func(ctx context.Context) call { return watch(ctx, client, request) }),
	}, nil
}

func within(deadline time.Duration, made func(context.Context) call) call {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	began := time.Now()
	answer := made(ctx)
	answer.Milliseconds = time.Since(began).Milliseconds()
	return answer
}

func check(
	ctx context.Context, client grpc_health_v1.HealthClient, request *grpc_health_v1.HealthCheckRequest,
) call {
	var headers metadata.MD
	response, err := client.Check(ctx, request, grpc.Header(&headers))
	answer := ended(err)
	if err == nil {
		answer.Messages = append(answer.Messages, response.GetStatus().String())
	}
	answer.Pod = pod(headers)
	return answer
}

func watch(
	ctx context.Context, client grpc_health_v1.HealthClient, request *grpc_health_v1.HealthCheckRequest,
) call {
	stream, err := client.Watch(ctx, request)
	if err != nil {
		return ended(err)
	}
	messages := []string{}
	for {
		response, err := stream.Recv()
		if err == nil {
			messages = append(messages, response.GetStatus().String())
			continue
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		answer := ended(err)
		answer.Messages = messages
		if headers, err := stream.Header(); err == nil {
			answer.Pod = pod(headers)
		}
		return answer
	}
}

func ended(err error) call {
	end := status.Convert(err)
	return call{Code: end.Code().String(), Message: end.Message(), Messages: []string{}}
}

func pod(headers metadata.MD) string {
	if names := headers.Get(podHeader); len(names) > 0 {
		return names[0]
	}
	return ""
}
