import org.apache.rocketmq.client.producer.DefaultMQProducer;
import org.apache.rocketmq.client.producer.SendStatus;
import org.apache.rocketmq.common.message.Message;

/**
 * Sends one message with Apache's own client and prints its id. What is packed, and how, is the client's own doing:
 * a body of more than 4 KiB, by -Drocketmq.message.compressType.
 *
 * java -cp 'LIB/*' Producer.java NAME_SERVER TOPIC TAG KEYS SIZE
 */
public class Producer {
    public static void main(String[] given) throws Exception {
        var producer = new DefaultMQProducer("java-" + System.nanoTime());
        producer.setNamesrvAddr(given[0]);
        producer.setSendMsgTimeout(60_000); // a busy machine takes long for the first one
        producer.setMqClientApiTimeout(60_000);
        Thread.setDefaultUncaughtExceptionHandler((thread, error) -> {
            error.printStackTrace();
            Runtime.getRuntime().halt(1); // the client's threads would keep this process
        });
        producer.start();
        var body = new StringBuilder("{\"no\":\"" + given[3] + "\",\"filling\":\"");
        while (body.length() < Integer.parseInt(given[4])) body.append("filling ");
        var message = new Message(given[1], given[2], given[3], body.append("\"}").toString().getBytes("UTF-8"));
        var sent = producer.send(message);
        if (sent.getSendStatus() != SendStatus.SEND_OK) throw new IllegalStateException(sent.toString());
        System.out.println("sent " + sent.getMsgId());
        System.out.flush();
        Runtime.getRuntime().halt(0); // an orderly end takes seconds
    }
}
