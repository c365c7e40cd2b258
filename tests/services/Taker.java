import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Map;
import org.apache.rocketmq.client.apis.ClientConfiguration;
import org.apache.rocketmq.client.apis.ClientServiceProvider;
import org.apache.rocketmq.client.apis.consumer.FilterExpression;

/**
 * Takes messages as Apache's client for gRPC does, acknowledges and prints the body of each, until it is killed.
 *
 * java -cp 'LIB/*' Taker.java PROXY GROUP TOPIC
 */
public class Taker {
    public static void main(String[] given) throws Exception {
        var consumer = ClientServiceProvider.loadService().newSimpleConsumerBuilder()
                .setClientConfiguration(ClientConfiguration.newBuilder().setEndpoints(given[0]).enableSsl(false).build())
                .setConsumerGroup(given[1])
                .setAwaitDuration(Duration.ofSeconds(5))
                .setSubscriptionExpressions(Map.of(given[2], FilterExpression.SUB_ALL))
                .build();
        while (true) {
            for (var message : consumer.receive(16, Duration.ofSeconds(30))) {
                consumer.ack(message);
                System.out.println("took " + StandardCharsets.UTF_8.decode(message.getBody()));
            }
        }
    }
}
